"""`import sdd.interop.converted` lets transformers' Auto classes load converted models, of model type `sdd-llama` etc.

    import sdd.interop.converted
    model = AutoModelForCausalLM.from_pretrained(folder)      # written by save_pretrained of a converted model

Without this import, transformers does not know the model type and refuses. See `sdd.conversion.pretrained`.
"""

from sdd.conversion.pretrained import Converted as Converted
from sdd.conversion.pretrained import install

install()
