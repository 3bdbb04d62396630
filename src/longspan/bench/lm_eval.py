"""EleutherAI's lm-evaluation-harness (lm-eval) on any longspan model, and RULER's tasks in it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.data import ruler
from longspan.errors import LongspanError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


class Loaded(NamedTuple):
    """A model in evaluation mode and the tokenizer that it reads with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = ("all",),
    lengths: Sequence[int] = (1024,),
    samples: int = 50,
    batch: int = 1,
    max_length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """lm-eval's results on RULER's tasks; `scores` reads the figures out of them.

    Args:
        tasks: of `ruler.TASKS`, or what several of them begin with, or `all`.
        lengths: tokens of prompt and answer together.
        samples: of each task at each length.
        batch: prompts at a time, padded on the left.
        max_length: how long an input the model is given; by default what its config states.
            Give more to see how it fares beyond that.

    Raises:
        LongspanError: lm-eval is not installed; an unknown task; a length beyond the model's, or
            too short for a task; a tokenizer that is not the model's.

    >>> evaluate(model, byte_tokenizer(), tasks=["needle"], lengths=[1024, 4096])
    """
    names = ruler.choose(tasks)
    if not lengths or samples < 1:
        raise LongspanError(
            f"there is nothing to evaluate at lengths={list(lengths)} with samples={samples}: "
            "give at least one of each."
        )
    stated = getattr(model.config, "max_position_embeddings", None)
    most = max_length or stated or max(lengths)
    if max(lengths) > most:
        raise LongspanError(
            f"the model takes {most} tokens and the lengths ask for {max(lengths)}: ask for at "
            f"most {most}, or give max_length={max(lengths)} to see how it fares beyond."
        )
    lm = harness(model, tokenizer, batch=batch, max_length=most)
    made = ruler_tasks(
        names,
        lengths=lengths,
        samples=samples,
        # As the harness counts them: with the special tokens that it adds.
        tokens=lambda text: len(lm.tok_encode(text)),
        seed=seed,
    )
    return run(lm, made)


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 1,
    max_length: int | None = None,
) -> Any:
    """The model in lm-eval's HFLM, for any task of its own: `simple_evaluate(model=…)`.

    A longer input than `max_length`, by default the config's, loses its first tokens there with a
    warning in the log; `evaluate` refuses it instead.

    Raises:
        LongspanError: lm-eval is not installed; a tokenizer that is not the model's; a batch of
            rows for a model that would see their padding.
    """
    _need()
    from lm_eval.models.huggingface import HFLM

    config = model.config
    wrap: Any = HFLM  # whose registration hides its arguments
    if len(tokenizer) > config.vocab_size:
        raise LongspanError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: give "
            "the tokenizer that the model was trained with."
        )
    if tokenizer.eos_token_id is None:
        raise LongspanError(
            "the tokenizer has no eos_token, with which lm-eval ends answers and pads: set it to "
            "a token that the model knows."
        )
    if batch > 1 and getattr(config, "allow_leaks", False):
        raise LongspanError(
            f"the model can see the future (allow_leaks=True), so in a batch of {batch} it would "
            "see the padding after shorter texts: give batch=1, or a strictly causal mechanism."
        )
    return wrap(
        pretrained=model,
        tokenizer=tokenizer,
        backend="seq2seq" if config.is_encoder_decoder else "causal",
        batch_size=batch,
        max_length=max_length,
    )


def ruler_tasks(
    names: Sequence[str],
    *,
    lengths: Sequence[int],
    samples: int,
    tokens: Callable[[str], int],
    seed: int = 0,
) -> list["ConfigurableTask"]:
    """RULER's tasks as lm-eval's, with one metric a length, named by it: the share of answers.

    Args:
        names: of `ruler.TASKS`.
        tokens: counts the tokens of a text.
    """
    _need()
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    made = []
    for name in names:
        rows = [
            {"length": length, **sample._asdict()}
            for length in lengths
            for sample in ruler.samples(
                name, length=length, count=samples, tokens=tokens, seed=seed
            )
        ]
        splits = {"test": Dataset.from_list(rows)}
        config = {
            "task": name,
            "custom_dataset": lambda splits=splits: splits,
            "test_split": "test",
            "output_type": "generate_until",
            "generation_kwargs": {
                "until": [],
                "do_sample": False,
                "max_gen_toks": ruler.TASKS[name].room,
            },
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["answers"],
            "process_results": _score,
            "metric_list": [
                {"metric": str(length), "aggregation": "mean", "higher_is_better": True}
                for length in lengths
            ],
        }
        made.append(ConfigurableTask(config=config))
    return made


def run(lm: Any, tasks: Sequence["ConfigurableTask"]) -> dict[str, Any]:
    """lm-eval's results of one of its models on tasks; no seed of the process is touched."""
    _need()
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    simple_evaluate: Any = evaluator.simple_evaluate  # whose decorator hides its arguments
    return simple_evaluate(
        model=lm,
        tasks=list(tasks),
        # Its own fourteen thousand tasks are neither indexed nor needed.
        task_manager=TaskManager(include_defaults=False),
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )


def scores(results: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Task → length → mean share of the answers that were given, 0 … 1."""
    return {
        name: {
            int(length): float(value)
            for key, value in metrics.items()
            if (length := key.partition(",")[0]).isdigit()
        }
        for name, metrics in results["results"].items()
    }


def load(folder: Path, *, device: str = "cpu") -> Loaded:
    """A model of a folder that `save_pretrained` wrote, with its tokenizer; without one, of bytes.

    Raises:
        LongspanError: no model there, or one of other tokens than bytes without its tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise LongspanError(
            f"{folder} holds no model (no config.json): give the folder that `longspan train "
            "--out` or save_pretrained wrote."
        )
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    import longspan.models  # noqa: F401 - registers them
    from longspan.data.byte_tokenizer import byte_tokenizer

    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif config.vocab_size == 256:
        tokenizer = byte_tokenizer()
    else:
        raise LongspanError(
            f"the model in {folder} has {config.vocab_size} tokens and no tokenizer beside it; "
            "only bytes (256) are read without: save its tokenizer into the same folder."
        )
    model: Any = auto.from_pretrained(folder)
    return Loaded(model.to(device).eval(), tokenizer)


def _score(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    return {str(row["length"]): ruler.matched(row["answers"], answers[0])}


def _need() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise LongspanError(
            "evaluating needs lm-eval, which is not installed: pip install 'longspan[eval]'."
        ) from error
