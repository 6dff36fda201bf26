"""Exported models for transformers' Auto classes: `import sdd.interop.huggingface`, then `from_pretrained(DIR)`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM, SDDModel

AutoConfig.register(SDDConfig.model_type, SDDConfig, exist_ok=True)
AutoModel.register(SDDConfig, SDDModel, exist_ok=True)
AutoModelForCausalLM.register(SDDConfig, SDDForCausalLM, exist_ok=True)
