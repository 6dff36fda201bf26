"""The data that a run's config names."""

from sdd.data import DataSource, resolve_data
from sdd.data.cache import Notify
from sdd.train.config import RunConfig


def resolve(config: RunConfig, notify: Notify | None = None) -> DataSource:
    """Find, and if need be tokenise, a run's data.

    Args:
        config: the run; token files that do not say how large their vocabulary is have the model's.
        notify: receives one line before work that takes a while; by default it is logged.

    Raises:
        UserError: see `resolve_data`.
    """
    data = config.data
    return resolve_data(
        data.path,
        data.tokenizer,
        context=config.model.context,
        dtype=data.dtype,
        eos=data.eos,
        vocab_size=config.model.vocab_size,
        notify=notify,
    )
