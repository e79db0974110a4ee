"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

RUNS = Path("runs")
Recipe = Annotated[str, Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships (demo).")]
SET = "Override a key, e.g. --set stages.dpo.args.beta=0.3. Repeatable."
Overrides = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help=SET)]
WITHOUT = "Leave a stage out, as --set stages.STAGE=null does. Repeatable."
Without = Annotated[list[str] | None, Option("--without", metavar="STAGE", help=WITHOUT)]
Runs = Annotated[Path, Option("--runs", help="Folder that holds the runs.")]
ACCELERATE = "Launch training with a profile of accelerate_configs/, e.g. ddp."
Accelerate = Annotated[str | None, Option("--accelerate", metavar="PROFILE", help=ACCELERATE)]
PROCESSES = "Number of training processes; overrides the profile's."
Processes = Annotated[int | None, Option("--processes", min=1, help=PROCESSES)]
RECORDED = "RECIPE is a run, whose recorded recipe has this fingerprint."
Recorded = Annotated[str | None, Option("--recorded", hidden=True, help=RECORDED)]
ENV_FILE = "File with OPENAI_API_KEY and the like."
EnvFile = Annotated[Path | None, Option("--env-file", exists=True, dir_okay=False, help=ENV_FILE)]
AsJson = Annotated[bool, Option("--json", help="Print it as JSON.")]
# Of the commands on adapters.
Folder = Annotated[Path, Argument(metavar="DIR", help="The folder of an adapter.")]
Out = Annotated[Path, Argument(metavar="OUT", help="The folder to write.")]
File = Annotated[Path, Argument(metavar="FILE", help="JSON lines; docs/adapters.md.", exists=True, dir_okay=False)]
BASE = "A folder with the base, instead of the one that the adapter names."
Base = Annotated[Path | None, Option("--base", metavar="PATH", help=BASE)]
STAGE = "DIR is a run, and this the stage of it whose model is used."
Stage = Annotated[str | None, Option("--stage", metavar="STAGE", help=STAGE)]
Temperature = Annotated[float, Option("--temperature", min=0, help="0 takes the most likely token.")]
Seed = Annotated[int, Option("--seed", help="The same seed and prompt give the same answer.")]
MaxNewTokens = Annotated[int, Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")]
BatchSize = Annotated[int, Option("--batch-size", min=1, help="Texts at once.")]
