"""The command line: ``omni-ray check | plan | serve | …``. Each verb imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from omni_ray import __version__
from omni_ray.errors import OmniRayError

DEFAULT_ADDRESS = "http://127.0.0.1:8000"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 it failed, 2 the command line is wrong."""
    parser = _parser()
    arguments, flags = parser.parse_known_args(argv)
    arguments.flags = flags
    arguments.flags_first = bool(flags) and _comes_before(sys.argv[1:] if argv is None else argv, flags[0], arguments)
    if flags and arguments.verb != "serve" and not getattr(arguments, "local", None):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        sys.exit(_run(arguments))
    except OmniRayError as error:
        sys.exit(error.message)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "check":
        from omni_ray.cli.check import check

        return check(arguments.file)
    if arguments.verb == "plan":
        from omni_ray.cli.plan import plan

        return plan(arguments.file, arguments.inventory)
    if arguments.verb == "helm-values":
        from omni_ray.cli.helm_values import helm_values

        return helm_values(arguments.file, arguments.inventory)
    if arguments.verb == "serve":
        return _serve(arguments)
    if arguments.verb == "calibrate":
        from omni_ray.cli.calibrate import calibrate

        return calibrate(arguments)
    if arguments.verb == "tune":
        from omni_ray.cli.tune import tune

        return tune(arguments)
    if arguments.verb == "env":
        from omni_ray.cli.environment import print_exports

        return print_exports()
    if arguments.verb == "key":
        from omni_ray.cli.key import key

        return key(arguments.name)
    if arguments.verb == "generate":
        from omni_ray.cli.generate import generate

        return generate(arguments)
    from omni_ray.cli.status import status

    return status(arguments.address)


def _comes_before(argv: Sequence[str], flag: str, arguments: argparse.Namespace) -> bool:
    """Whether a flag of MODEL stands before MODEL itself, so that its value may have been taken for MODEL."""
    return arguments.verb == "serve" and list(argv).index(flag) < list(argv).index(arguments.file)


def _serve(arguments: argparse.Namespace) -> int:
    from omni_ray.cli.flags import file_of, is_file, show
    from omni_ray.config.load import load_file
    from omni_ray.errors import ConfigError

    if arguments.flags_first:
        raise ConfigError(
            f"{arguments.flags[0]} stands before MODEL; put MODEL first, as in `omni-ray serve MODEL --flag`"
        )
    if not is_file(arguments.file):
        file = file_of(arguments.file, arguments.flags, arguments.type)
    elif arguments.flags or arguments.type:
        raise ConfigError(f"{arguments.file} is a file, which says all of its models; flags are for a MODEL")
    else:
        file = load_file(arguments.file)
    if arguments.show_yaml:
        print(show(file), end="")
        return 0
    from omni_ray.cli.serve import serve

    return serve(file, arguments.host, arguments.port)


def _parser() -> argparse.ArgumentParser:
    from omni_ray.cli import flags

    parser = argparse.ArgumentParser(
        prog="omni-ray", description="Serves LLMs (vLLM) and diffusion transformers (diffusers) behind one endpoint."
    )
    parser.add_argument("--version", action="version", version=f"omni-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    check = verbs.add_parser("check", help="say what is wrong with a file, without starting anything")
    check.add_argument("file", metavar="FILE", help="a Ray Serve config, such as deployments/omni.yaml")

    plan = verbs.add_parser(
        "plan",
        help="say what would run where, whether it fits and how fast, without starting anything",
        description="Needs no GPU, no network and no weights: sizes come from the checkpoints' configs and headers.",
    )
    _add_file_and_inventory(plan)

    helm_values = verbs.add_parser(
        "helm-values",
        help="write the values of the Helm chart that follow from a file and its plan",
        description="Prints a values file for helm/omni-ray. Needs what `omni-ray plan` needs.",
    )
    _add_file_and_inventory(helm_values)

    serve = verbs.add_parser(
        "serve",
        help="serve a file, with a progress line per model",
        description="Serves FILE, or one MODEL, until Ctrl-C, on a Ray of its own, or on the cluster that RAY_ADDRESS "
        "names.",
        epilog=flags.help_text(),
    )
    flags.add_arguments(serve)
    serve.add_argument("--host", help="listen here (default: what FILE says, else 127.0.0.1)")
    serve.add_argument("--port", type=int, help="listen on this port (default: what FILE says, else 8000)")

    _add_tools(verbs)
    return parser


def _add_tools(verbs: Any) -> None:
    """The verbs beside those that serve a file."""
    from omni_ray.cli import calibrate, generate, tune

    calibrate.add_arguments(
        verbs.add_parser(
            "calibrate",
            help="fit TeaCache to a model",
            description="Runs a few prompts on this machine, fits the curve that TeaCache needs, tries thresholds (a "
            "higher one skips more steps), and writes a file that `cache.calibration` names, and a plot.",
        )
    )

    tune.add_arguments(
        verbs.add_parser(
            "tune",
            help="measure every lever on a model, and write the fastest profile of a given quality",
            description="Runs a few prompts on this machine with each lever alone and with the good ones together.",
        )
    )

    generate.add_arguments(
        verbs.add_parser(
            "generate",
            help="from a prompt: text to the terminal, images and videos to files",
            description="Asks a running server, or runs a diffusion pipeline in this process. Ctrl-C cancels.",
        ),
        DEFAULT_ADDRESS,
    )
    verbs.add_parser(
        "env",
        help="print what to export before `serve run`, and on every node before `ray start`",
        description='As the shell reads it: eval "$(omni-ray env)". Variables that are set stay.',
    )

    key = verbs.add_parser("key", help="make an API key, and its line for the file that api.keys_file names")
    key.add_argument("name", metavar="NAME", help="what the audit log and messages call it")

    status = verbs.add_parser("status", help="what a running server is doing")
    status.add_argument("--address", default=DEFAULT_ADDRESS, help="of the server (default: %(default)s)")


def _add_file_and_inventory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a Ray Serve config, such as deployments/omni.yaml")
    parser.add_argument(
        "--inventory",
        action="append",
        default=[],
        metavar="NODES",
        help="plan for such nodes, as in '8xH100-80G x 2': GPUs per node, card, nodes; repeat it for unlike nodes "
        "(default: this machine)",
    )
