"""Token ids → hidden states → logits: layers, backbone, tokenizer, preprocessors and tasks."""

from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.causal_lm import GemmaCausalLM
from keras_gemma.models.causal_lm_preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.models.generating import GeneratedText
from keras_gemma.models.reward_model import GemmaRewardModel
from keras_gemma.models.reward_model_preprocessor import GemmaRewardModelPreprocessor
from keras_gemma.models.scoring import TextScore
from keras_gemma.models.text_classifier import GemmaTextClassifier
from keras_gemma.models.text_classifier_preprocessor import GemmaTextClassifierPreprocessor
from keras_gemma.models.tokenizer import GemmaTokenizer
from keras_gemma.models.vocabulary import train_vocabulary

__all__ = [
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaRewardModel",
    "GemmaRewardModelPreprocessor",
    "GemmaTextClassifier",
    "GemmaTextClassifierPreprocessor",
    "GemmaTokenizer",
    "GeneratedText",
    "TextScore",
    "train_vocabulary",
]
