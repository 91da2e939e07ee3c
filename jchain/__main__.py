"""The command line: `jchain search` makes a bank, or reads one from checkpoints, and searches it, `jchain evaluate` scores chains of
a result, `jchain export` writes one as a checkpoint."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jchain as jc
from jchain import distributed, images, report
from jchain.data import LOADERS, SPLITS, Dataset
from jchain.hub import jobs
from jchain.problem import check_max_layers

BANKS = ("independent", "routed", "snapshots", "random")
LAYERS = {
    "residual": jc.layers.ResidualMLP,
    "dense": jc.layers.Dense,
    "invertible-dense": jc.layers.InvertibleDense,
    "invertible-coupling": jc.layers.AdditiveCoupling,
    "invertible-residual": jc.layers.InvertibleResidual,
}
# Convolutions of a block, in turn.
CONV_DEPTHS = (1, 2, 3)
# Side up to which the stem leaves images as they are; it pools larger ones by how many times they are as large.
CONV_SIDE = 16
ENCODINGS = {"tokens": jc.TokenEncoding, "weights": jc.WeightEncoding}
SEARCHES = {
    "actor-critic": lambda args: jc.ActorCritic(encoding=ENCODINGS[args.encoding]()),
    "beam": lambda args: jc.BeamSearch(),
    "critic": lambda args: jc.CriticSearch(),
    "evolution": lambda args: jc.Evolution(),
    "linearized": lambda args: jc.LinearizedSearch(),
    "local": lambda args: jc.LocalSearch(),
    "mcts": lambda args: jc.MCTS(),
    "meet-in-the-middle": lambda args: jc.MeetInTheMiddle(),
    "q-learning": lambda args: jc.QLearning(),
    "random": lambda args: jc.RandomSearch(),
    "target-propagation": lambda args: jc.TargetPropagation(),
}
UPDATES = {
    "never": jc.updates.Frozen,
    "found": jc.updates.TuneFound,
    "clones": jc.updates.CloneThenTune,
    "shared": jc.updates.SharedUpdates,
}


CLUSTER = """\
on a cluster:
  Start the same command once on every host; the bank file must be readable on each. Where JAX knows the cluster (Slurm,
  Open MPI, Kubernetes, Cloud TPU), as in
    srun --ntasks-per-node=1 jchain evaluate RESULT --all 4 --distributed
  elsewhere with the address of one host, the number of hosts and the place of each among them:
    jchain evaluate RESULT --all 4 --distributed --coordinator host0:1234 --num-processes 2 --process-id 0
    jchain evaluate RESULT --all 4 --distributed --coordinator host0:1234 --num-processes 2 --process-id 1
  Chains are spread over all devices of all hosts. Process 0 prints.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 when the input is bad, with one line that says why."""
    args = _parser().parse_args(argv)
    args.command = shlex.join(["jchain", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"jchain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jchain: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jchain", description="Search over chains of detached (frozen) layers.")
    parser.add_argument("--version", action="version", version=jc.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_search(commands)
    _add_evaluate(commands)
    _add_export(commands)
    prepare = commands.add_parser(
        "prepare", help="download an image set of tensorflow-datasets and write it for jchain"
    )
    prepare.add_argument("name", help="as in tensorflow-datasets: mnist, fashion_mnist, cifar10, ...")
    _add_data_dir(prepare)
    prepare.set_defaults(run=_prepare)
    return parser


def _add_data(command: argparse.ArgumentParser, default: str | None, note: str) -> None:
    known = ", ".join(sorted(LOADERS))
    command.add_argument(
        "--data", default=default, help=f"data set: {known}, or one of images that is prepared ({note})"
    )
    _add_data_dir(command)
    command.add_argument(
        "--sizes",
        type=_parse_sizes,
        metavar="N,N,N,N",
        help=f"examples of {', '.join(SPLITS)} (default: as many as there are)",
    )


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", type=Path, help="folder of prepared sets (default: that of tensorflow-datasets)")


def _add_search(commands: Any) -> None:
    search = commands.add_parser("search", help="make a bank, or read one from checkpoints, and search it")
    _add_data(search, None, "default: digits, but where there are checkpoints")
    _add_pretrained(search)
    search.add_argument("--bank", choices=BANKS, default="routed", help="how the bank is made (default: %(default)s)")
    search.add_argument(
        "--layer",
        choices=sorted([*LAYERS, "conv"]),
        help="module of the layers; conv: blocks of 1, 2 and 3 convolutions in turn (default: conv for images, else residual)",
    )
    search.add_argument("--channels", type=int, default=16, help="of convolutions (default: %(default)s)")
    search.add_argument("--num-layers", type=int, default=12, help="layers in the bank (default: %(default)s)")
    search.add_argument(
        "--num-heads",
        type=int,
        help="heads of a routed or random bank (default: 1; 2 with conv, a pooled and a dense one)",
    )
    search.add_argument(
        "--depth", type=int, default=4, help="layers of each net, or route, that is trained (default: %(default)s)"
    )
    search.add_argument(
        "--num-steps", type=int, default=1000, help="gradient steps that make the bank (default: %(default)s)"
    )
    search.add_argument(
        "--max-layers",
        type=int,
        help="most layers in a chain (default: depth; of checkpoints all blocks that are not pinned)",
    )
    search.add_argument("--min-layers", type=int, default=0, help="fewest layers in a chain (default: %(default)s)")
    search.add_argument(
        "--layer-cost", type=float, default=0.0, help="price of a layer in units of the loss (default: %(default)s)"
    )
    search.add_argument(
        "--search",
        choices=sorted(SEARCHES),
        help="search (default: actor-critic; of checkpoints local)",
    )
    search.add_argument(
        "--encoding",
        choices=sorted(ENCODINGS),
        default="tokens",
        help="what the actor-critic sees (default: %(default)s)",
    )
    search.add_argument(
        "--update",
        choices=UPDATES,
        default="never",
        help="when weights are trained on: never, those of the found chain, of clones that join the bank, or of all that the "
        "actor-critic samples (default: %(default)s)",
    )
    search.add_argument(
        "--budget",
        type=int,
        help="layer calls, those of gradient steps included (default: 20000; of checkpoints 1000)",
    )
    search.add_argument("--seed", type=int, default=0, help="of splits, bank and search (default: %(default)s)")
    search.add_argument("--out", type=Path, help="result folder (default: results/DATA-BANK-SEARCH-SEED)")
    search.add_argument("--replace", action="store_true", help="replace a result that is in the folder")
    search.add_argument("--json", action="store_true", help="print the result as one JSON object in the last line")
    search.set_defaults(run=_search)


def _add_pretrained(search: argparse.ArgumentParser) -> None:
    pretrained = search.add_argument_group("pretrained transformers")
    pretrained.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="DIR",
        help="Hugging Face checkpoint folder, or several of one architecture: their blocks are the bank",
    )
    pretrained.add_argument(
        "--text", nargs="+", metavar="FILE", help="text that chains are judged on, by the next token"
    )
    pretrained.add_argument(
        "--choices", metavar="FILE", help='or JSON lines of {"question": ..., "choices": [...], "answer": 0}'
    )
    pretrained.add_argument(
        "--length", type=int, help="tokens of a sequence, or question (default: 128, or the longest)"
    )
    pretrained.add_argument(
        "--pinned",
        type=_parse_pinned,
        metavar="FIRST,LAST",
        help="blocks that every chain begins and ends with (default: 1,1)",
    )
    pretrained.add_argument(
        "--sweep",
        type=int,
        metavar="K",
        help="search chains of at most K, K + 1, ... layers too, up to --max-layers, the budget for each, beside recipes",
    )
    pretrained.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (default: the file's)"
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score chains of a saved bank",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=CLUSTER,
    )
    evaluate.add_argument("bank", type=Path, help="a bank file, or the result folder of a search")
    evaluate.add_argument(
        "--chain",
        action="append",
        metavar="TOKENS",
        help="layer tokens and a head, as in 3,0,7,12; repeat for more (default: the chain that the search found)",
    )
    _add_data(evaluate, None, "default: that of the search, or digits")
    evaluate.add_argument("--seed", type=int, help="of the splits (default: that of the search, or 0)")
    evaluate.add_argument(
        "--split",
        choices=("search", "select", "test"),
        default="search",
        help="what to score on (default: %(default)s)",
    )
    evaluate.add_argument(
        "--all", type=int, metavar="LAYERS", help="score every chain of up to so many layers and print the 10 best"
    )
    evaluate.add_argument("--json", action="store_true", help="print the result as one JSON object in the last line")
    evaluate.add_argument("--distributed", action="store_true", help="share the work with other processes, see below")
    evaluate.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    evaluate.add_argument("--num-processes", type=int, help="how many processes there are")
    evaluate.add_argument("--process-id", type=int, help="which of them this is, from 0")
    evaluate.add_argument(
        "--timeout", type=float, default=300, help="seconds to wait for the others (default: %(default)s)"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a chain of checkpoints as a checkpoint")
    export.add_argument("result", type=Path, help="the result folder of jchain search --checkpoint")
    export.add_argument("--out", type=Path, required=True, help="folder to write, which is not there yet")
    export.add_argument("--chain", metavar="TOKENS", help="as in 3,0,7,12 (default: the chain that the search found)")
    export.add_argument(
        "--max-shard-size", type=int, default=5 * 10**9, help="bytes of a file of weights (default: %(default)s)"
    )
    export.set_defaults(run=_export)


def _search(args: argparse.Namespace) -> None:
    args.search = args.search or ("local" if args.checkpoint else "actor-critic")
    args.budget = (1000 if args.checkpoint else 20_000) if args.budget is None else args.budget
    if args.checkpoint:
        _check_checkpoint(args)
    else:
        _check_no_checkpoint(args)
        args.data = args.data or "digits"
        args.max_layers = check_max_layers(args.depth if args.max_layers is None else args.max_layers)
    name = "+".join(Path(path).resolve().name for path in args.checkpoint or ()) or f"{args.data}-{args.bank}"
    args.out = args.out or Path("results") / f"{name}-{args.search}-{args.seed}"
    report.check_out(args.out, replace=args.replace)
    _check_search(args)
    setting = None
    if not args.checkpoint:
        data = jc.data.load(args.data, args.seed, sizes=args.sizes, data_dir=args.data_dir)
        modules = _make_modules(args, data)  # which settles options that were left open
        setting = report.train_setting(vars(args), data, modules)
    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("run", "json", "replace")
    }
    setting = setting or report.checkpoint_setting(config)
    job = report.search(config, setting, SEARCHES[args.search](args), UPDATES[args.update]())
    report.write(args.out, job)
    report.print_table(job)
    print(f"Wrote {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    if args.json:
        print(json.dumps(job.result))


def _check_checkpoint(args: argparse.Namespace) -> None:
    """Options that do not go with checkpoints, and paths of which there are none."""
    parser = _parser().parse_args(["search"])
    for name in ("bank", "layer", "channels", "num_layers", "num_heads", "depth", "num_steps"):
        if getattr(args, name) != getattr(parser, name):
            raise ValueError(f"expected no --{name.replace('_', '-')} with --checkpoint, whose layers are its blocks")
    if args.search == "meet-in-the-middle":
        raise ValueError(
            "expected another search with --checkpoint, whose blocks cannot be undone, got meet-in-the-middle"
        )
    args.pinned = args.pinned or (1, 1)
    if args.max_layers is not None:
        args.max_layers = check_max_layers(args.max_layers)
    if args.sweep is not None:
        if args.sweep < 0:
            raise ValueError(f"expected --sweep of at least 0, got {args.sweep}")
        if args.update != "never":
            raise ValueError(f"expected --update never with --sweep, got {args.update}")
    args.checkpoint = [str(Path(path).resolve()) for path in args.checkpoint]
    args.data_dir = args.data_dir and args.data_dir.resolve()
    args.text = args.text and [str(Path(path).resolve()) for path in args.text]
    args.choices = args.choices and str(Path(args.choices).resolve())


def _check_no_checkpoint(args: argparse.Namespace) -> None:
    for name in ("text", "choices", "length", "pinned", "dtype", "sweep"):
        if getattr(args, name) is not None:
            raise ValueError(f"expected --checkpoint with --{name}")


def _check_search(args: argparse.Namespace) -> None:
    """What a search needs, before anything is loaded."""
    invertible = [name for name, layer in LAYERS.items() if hasattr(layer, "invert")]
    if args.search == "meet-in-the-middle" and args.layer not in invertible:
        raise ValueError(
            f"expected --layer of {', '.join(invertible)}, which can be undone, got {args.layer or 'the default'}"
        )
    if args.update == "shared" and args.search != "actor-critic":
        raise ValueError(f"expected --search actor-critic with --update shared, got {args.search}")


def _make_modules(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Layers, heads and stem, by the shape of the data where the options leave it open."""
    shape = data.train.x.shape[1:]
    is_image = len(shape) == 3
    args.layer = args.layer or ("conv" if is_image else "residual")
    if is_image != (args.layer == "conv"):
        raise ValueError(f"expected --layer conv for images and for nothing else, got {args.layer} for {list(shape)}")
    has_nets = args.bank in ("independent", "snapshots")
    if args.num_heads is None:
        args.num_heads = 2 if is_image and not has_nets else 1
    if not is_image:
        return {"layer": LAYERS[args.layer](shape[-1]), "head": jc.layers.DenseHead(data.num_classes)}
    stem = jc.layers.ConvStem(args.channels, pool=max(1, max(shape[:2]) // CONV_SIDE))
    return {
        "layer": [jc.layers.ConvBlock(args.channels, depth) for depth in CONV_DEPTHS],
        "head": [jc.layers.PoolHead(data.num_classes), jc.layers.ConvHead(data.num_classes)],
        "stem": stem,
        "stem_params": stem.init(jax.random.key(args.seed), data.train.x[:1])["params"],
    }


def _prepare(args: argparse.Namespace) -> None:
    print(f"Prepared in {images.prepare(args.name, args.data_dir)}")


def _evaluate(args: argparse.Namespace) -> None:
    mesh = _join(args)
    config, found = report.read_config(args.bank)
    bank, task = _load_result(args, config)
    split = getattr(task.data, args.split)
    if args.all is not None:
        if args.chain:
            raise ValueError("expected --all or --chain, got both")
        chains, out = jc.evaluate_all(jc.Problem(bank, split, max_layers=args.all, **task.options), mesh=mesh)
        shown = np.argsort(out.loss, kind="stable")[:10]
    else:
        tokens = [_parse_chain(text) for text in args.chain] if args.chain else found
        if not tokens:
            raise ValueError("expected --all, or at least one --chain, as in --chain 3,0,7,12")
        chains = jc.chain.pad(tokens)
        out = jc.evaluate(jc.Problem(bank, split, max_layers=chains.shape[1] - 1, **task.options), chains, mesh=mesh)
        shown = np.arange(len(chains))
    rows = [_describe(bank, chains[i], out.loss[i], out.accuracy[i]) for i in shown]
    if jax.process_index() > 0:
        return
    for row in rows:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"loss {loss}  accuracy {row['accuracy']:.3f}  {' -> '.join(row['layers'])}")
    if args.json:
        print(json.dumps({"split": args.split, "layer_calls": int(out.layer_calls), "chains": rows}))


def _load_result(args: argparse.Namespace, config: dict[str, Any]) -> tuple[jc.Bank, jobs.Task]:
    """The bank of a result folder, or of a file, and what its chains are judged on."""
    path = args.bank / report.BANK_FILE if args.bank.is_dir() else args.bank
    if config.get("checkpoint"):
        if args.data:
            raise ValueError("expected no --data: chains of checkpoints are scored on what they were searched on")
        changed: dict[str, Any] = {"seed": args.seed, "sizes": args.sizes, "data_dir": args.data_dir}
        task = jobs.load_task(config | {name: value for name, value in changed.items() if value is not None})
        return (jc.Bank.load(path) if path.exists() else jobs.load_bank(config)), task
    # Of another set the options of the search say nothing.
    said = config if args.data in (None, config.get("data")) else {}
    data = jc.data.load(
        args.data or config.get("data", "digits"),
        config.get("seed", 0) if args.seed is None else args.seed,
        sizes=args.sizes or said.get("sizes"),
        data_dir=args.data_dir or said.get("data_dir"),
    )
    return jc.Bank.load(path), jobs.Task(data, {})


def _export(args: argparse.Namespace) -> None:
    config, found = report.read_config(args.result)
    if not config.get("checkpoint"):
        raise ValueError(f"expected the result of jchain search --checkpoint, got {args.result}")
    if args.out.exists():
        raise FileExistsError(f"expected no folder at {args.out}, found one")
    path = args.result / report.BANK_FILE
    bank = jc.Bank.load(path) if path.exists() else jobs.load_bank(config)
    tokens = _parse_chain(args.chain) if args.chain else found[0]
    facts = {"checkpoints": ", ".join(config["checkpoint"])}
    if not args.chain:
        facts |= report.tell(args.result)
    sources = dict(zip(jobs.name_models(config["checkpoint"]), config["checkpoint"], strict=True))
    out = jc.hub.export(bank, tokens, sources, args.out, facts=facts, max_shard_size=args.max_shard_size)
    print(f"Wrote {out}")


def _join(args: argparse.Namespace) -> Mesh | None:
    """The devices of all processes; None where there is only this one."""
    place = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed:
        distributed.initialize(*place, timeout=args.timeout)
        return distributed.make_mesh()
    if place != (None, None, None):
        raise ValueError("expected --distributed with --coordinator, --num-processes and --process-id")
    return None


def _describe(bank: jc.Bank, chain: np.ndarray, loss: Any, accuracy: Any) -> dict[str, Any]:
    tokens = [int(token) for token in chain if token != jc.chain.PADDING]
    return {
        "chain": tokens,
        "layers": [bank.names[token] for token in tokens],
        "loss": report.finite_or_none(loss),
        "accuracy": float(accuracy),
    }


def _parse_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes as in 5000,1000,1000,1000, got {text!r}") from None


def _parse_pinned(text: str) -> tuple[int, int]:
    try:
        first, last = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers as in 1,1, got {text!r}") from None
    return first, last


def _parse_chain(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(f"expected a chain as tokens with commas between, 3,0,7,12, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
