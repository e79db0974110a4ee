"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

RUNS = Path("runs")
Recipe = Annotated[str, Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships (demo).")]
Overrides = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set stages.dpo.args.beta=0.3. Repeatable."),
]
Without = Annotated[
    list[str] | None,
    Option("--without", metavar="STAGE", help="Leave a stage out, as --set stages.STAGE=null does. Repeatable."),
]
Runs = Annotated[Path, Option("--runs", help="Folder that holds the runs.")]
Accelerate = Annotated[
    str | None,
    Option("--accelerate", metavar="PROFILE", help="Launch training with a profile of accelerate_configs/, e.g. ddp."),
]
Processes = Annotated[
    int | None, Option("--processes", min=1, help="Number of training processes; overrides the profile's.")
]
Recorded = Annotated[
    str | None, Option("--recorded", hidden=True, help="RECIPE is a run, whose recorded recipe has this fingerprint.")
]
EnvFile = Annotated[
    Path | None, Option("--env-file", exists=True, dir_okay=False, help="File with OPENAI_API_KEY and the like.")
]
# Of the commands on adapters.
Folder = Annotated[Path, Argument(metavar="DIR", help="The folder of an adapter.")]
Out = Annotated[Path, Argument(metavar="OUT", help="The folder to write.")]
Base = Annotated[
    Path | None,
    Option("--base", metavar="PATH", help="A folder with the base, instead of the one that the adapter names."),
]
Stage = Annotated[
    str | None, Option("--stage", metavar="STAGE", help="DIR is a run, and this the stage of it whose model is used.")
]
