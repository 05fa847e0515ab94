"""Token ids → hidden states → logits: layers, backbone, tokenizer, preprocessor and task."""

from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.causal_lm import GemmaCausalLM
from keras_gemma.models.causal_lm_preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.models.tokenizer import GemmaTokenizer

__all__ = ["GemmaBackbone", "GemmaCausalLM", "GemmaCausalLMPreprocessor", "GemmaTokenizer"]
