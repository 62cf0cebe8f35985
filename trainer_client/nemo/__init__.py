"""NeMo AutoModel trains through draftmq: a target backend of its own kind, and its EAGLE-3 recipe.

In NeMo's YAML: ``recipe: trainer_client.nemo.TrainEagle3Recipe`` and ``remote_urls:
[tcp://HOST:5555]`` (``docs/nemo.md``). Importing this needs ``nemo_automodel``; nothing else of
draftmq imports it.
"""

from trainer_client.nemo.backend import BrokerTarget
from trainer_client.nemo.recipe import TrainEagle3Recipe

__all__ = ["BrokerTarget", "TrainEagle3Recipe"]
