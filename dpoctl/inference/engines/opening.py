"""Open the engine of `--engine` for a model. Other engines than the default are imported when they are asked for."""

from collections.abc import Callable

from ...data.chats import TemplateOptions
from ...models.load import context_without_weights, load_policy
from ...models.place import Place
from ...models.tokenizers import load_codec
from ...runtime.devices import Compute, open_compute
from ..options import EngineOptions
from ..values import require_values, use_values, warn_of_values
from .engine import Engine
from .local import LocalEngine

OpenCompute = Callable[[], Compute]


def open_engine(
    options: EngineOptions,
    templates: TemplateOptions,
    model: str,
    compute: OpenCompute | None = None,
    ilql_beta: float | None = None,
) -> Engine:
    """The engine of the options for a model: a directory, an adapter's directory or a hub id.

    `compute` opens the device of models in this process; `ilql_beta` is how much the values of a model of train-ilql
    count in this package's own engine. Raises InputError for whatever is wrong with engine and model.
    """
    if options.engine == "transformers":
        found = compute() if compute else open_compute(options.device, options.dtype)
        place = Place(found.device, found.dtype)
        code, revision = options.trust_remote_code, options.revision
        if ilql_beta is not None:
            require_values(model, revision)  # before the weights are read
        policy = load_policy(model, place, revision=revision, trust_remote_code=code, templates=templates)
        use_values(policy, model, revision, ilql_beta)
        return LocalEngine(policy, found)
    warn_of_values(model, options.revision)
    codec = load_codec(
        model, revision=options.revision, trust_remote_code=options.trust_remote_code, templates=templates
    )
    context = context_without_weights(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    if options.engine == "server":
        from .server import ServerEngine

        return ServerEngine(options, model, codec, context)
    from .vllm_engine import VllmEngine

    return VllmEngine(options, model, codec, context)
