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
from jchain import images
from jchain.cli import checkpoints as jobs
from jchain.cli import parser as options
from jchain.cli import pipeline, report
from jchain.data import Dataset
from jchain.engine import distributed
from jchain.problem import check_max_layers, check_min_layers

# Convolutions of a block, in turn.
CONV_DEPTHS = (1, 2, 3)
# Side up to which the stem leaves images as they are; it pools larger ones by how many times they are as large.
CONV_SIDE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 when the input is bad, with one line that says why."""
    args = options.make_parser().parse_args(argv)
    args.command = shlex.join(["jchain", *(sys.argv[1:] if argv is None else argv)])
    try:
        JOBS[args.job](args)
    except (ValueError, OSError, ImportError) as error:
        print(f"jchain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jchain: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _search(args: argparse.Namespace) -> None:
    args.search = args.search or ("local" if args.checkpoint else "actor-critic")
    args.budget = (1000 if args.checkpoint else 20_000) if args.budget is None else args.budget
    if args.checkpoint:
        _check_checkpoint(args)
    else:
        _check_no_checkpoint(args)
        args.data = args.data or "digits"
        args.max_layers = check_max_layers(
            args.depth if args.max_layers is None else args.max_layers
        )
    name = (
        "+".join(Path(path).resolve().name for path in args.checkpoint or ())
        or f"{args.data}-{args.bank}"
    )
    args.out = args.out or Path("results") / f"{name}-{args.search}-{args.seed}"
    report.check_out(args.out, replace=args.replace)
    _check_search(args)
    setting = None
    if not args.checkpoint:
        data = jc.data.load(args.data, args.seed, sizes=args.sizes, data_dir=args.data_dir)
        modules = _make_modules(args, data)  # which settles options that were left open
        setting = pipeline.train_setting(vars(args), data, modules)
    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("job", "json", "replace")
    }
    setting = setting or pipeline.checkpoint_setting(config)
    job = pipeline.search(
        config, setting, options.SEARCHES[args.search](args), options.UPDATES[args.update]()
    )
    out = report.write(args.out, job, replace=args.replace)
    report.print_table(job)
    print(f"Wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if args.json:
        print(json.dumps(job.result))


def _check_checkpoint(args: argparse.Namespace) -> None:
    """Options that do not go with checkpoints, and paths of which there are none."""
    parser = options.make_parser().parse_args(["search"])
    for name in ("bank", "layer", "channels", "num_layers", "num_heads", "depth", "num_steps"):
        if getattr(args, name) != getattr(parser, name):
            raise ValueError(
                f"expected no --{name.replace('_', '-')} with --checkpoint, whose layers are its blocks"
            )
    if args.search == "suffix-beam":
        raise ValueError(
            "expected another search with --checkpoint, whose blocks cannot be undone, got suffix-beam"
        )
    args.pinned = args.pinned or (1, 1)
    if args.max_layers is not None:
        args.max_layers = check_max_layers(args.max_layers)
    if args.sweep is not None:
        if args.sweep < 0:
            raise ValueError(f"expected --sweep of at least 0, got {args.sweep}")
        if args.max_layers is not None:
            pipeline.check_sweep(args.sweep, args.max_layers)
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
    invertible = [name for name, layer in options.LAYERS.items() if hasattr(layer, "invert")]
    if args.search == "suffix-beam" and args.layer not in invertible:
        raise ValueError(
            f"expected --layer of {', '.join(invertible)}, which can be undone, got {args.layer or 'the default'}"
        )
    if args.budget < 1:
        raise ValueError(f"expected a budget of at least 1, got {args.budget}")
    if args.max_layers is not None:
        check_min_layers(args.min_layers, args.max_layers)
    if not 0 <= args.layer_cost < float("inf"):
        raise ValueError(f"expected a finite --layer-cost of at least 0, got {args.layer_cost}")
    if args.encoding and args.search != "actor-critic":
        raise ValueError(f"expected --search actor-critic with --encoding, got {args.search}")
    if args.update == "shared" and args.search != "actor-critic":
        raise ValueError(f"expected --search actor-critic with --update shared, got {args.search}")


def _make_modules(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Layers, heads and stem, by the shape of the data where the options leave it open."""
    shape = data.train.x.shape[1:]
    is_image = len(shape) == 3
    args.layer = args.layer or ("conv" if is_image else "residual")
    if is_image != (args.layer == "conv"):
        raise ValueError(
            f"expected --layer conv for images and for nothing else, got {args.layer} for {list(shape)}"
        )
    has_nets = args.bank in ("independent", "snapshots")
    if args.num_heads is None:
        args.num_heads = 2 if is_image and not has_nets else 1
    if not is_image:
        if args.channels is not None:
            raise ValueError(f"expected --channels for images alone, got it for {list(shape)}")
        return {
            "layer": options.LAYERS[args.layer](shape[-1]),
            "head": jc.layers.DenseHead(data.num_classes),
        }
    args.channels = options.CHANNELS if args.channels is None else args.channels
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
        chains, out = jc.evaluate_all(
            jc.Problem(bank, split, max_layers=args.all, **task.options), mesh=mesh
        )
        shown = np.argsort(out.loss, kind="stable")[:10]
    else:
        tokens = [options.parse_chain(text) for text in args.chain] if args.chain else found
        if not tokens:
            raise ValueError("expected --all, or at least one --chain, as in --chain 3,0,7,12")
        chains = jc.chain.pad(tokens)
        out = jc.evaluate(
            jc.Problem(bank, split, max_layers=chains.shape[1] - 1, **task.options),
            chains,
            mesh=mesh,
        )
        shown = np.arange(len(chains))
    rows = [_describe(bank, chains[i], out.loss[i], out.accuracy[i]) for i in shown]
    if jax.process_index() > 0:
        return
    for row in rows:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"loss {loss}  accuracy {row['accuracy']:.3f}  {' -> '.join(row['layers'])}")
    if args.json:
        print(
            json.dumps({"split": args.split, "layer_calls": int(out.layer_calls), "chains": rows})
        )


def _load_result(args: argparse.Namespace, config: dict[str, Any]) -> tuple[jc.Bank, jobs.Task]:
    """The bank of a result folder, or of a file, and what its chains are judged on."""
    path = args.bank / report.BANK_FILE if args.bank.is_dir() else args.bank
    if config.get("checkpoint"):
        if args.data:
            raise ValueError(
                "expected no --data: chains of checkpoints are scored on what they were searched on"
            )
        changed: dict[str, Any] = {
            "seed": args.seed,
            "sizes": args.sizes,
            "data_dir": args.data_dir,
        }
        task = jobs.load_task(
            config | {name: value for name, value in changed.items() if value is not None}
        )
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
    tokens = options.parse_chain(args.chain) if args.chain else found[0]
    facts = {"checkpoints": ", ".join(config["checkpoint"])}
    if not args.chain:
        facts |= report.tell(args.result)
    sources = dict(zip(jobs.name_models(config["checkpoint"]), config["checkpoint"], strict=True))
    out = jc.hub.export(
        bank, tokens, sources, args.out, facts=facts, max_shard_size=args.max_shard_size
    )
    print(f"Wrote {out}")


def _join(args: argparse.Namespace) -> Mesh | None:
    """The devices of all processes; None where there is only this one."""
    place = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed:
        distributed.initialize(*place, timeout=args.timeout)
        return distributed.make_mesh()
    if place != (None, None, None):
        raise ValueError(
            "expected --distributed with --coordinator, --num-processes and --process-id"
        )
    return None


def _describe(bank: jc.Bank, chain: np.ndarray, loss: Any, accuracy: Any) -> dict[str, Any]:
    tokens = [int(token) for token in chain if token != jc.chain.PADDING]
    return {
        "chain": tokens,
        "layers": [bank.names[token] for token in tokens],
        "loss": pipeline.finite_or_none(loss),
        "accuracy": float(accuracy),
    }


JOBS = {"search": _search, "evaluate": _evaluate, "export": _export, "prepare": _prepare}


if __name__ == "__main__":
    sys.exit(main())
