"""Makes the shipped weights anew: python -m tabletop [NAME ...]"""

from harness.flags import Parser
from tabletop.models import SHIPPED, WEIGHTS, ship


def main():
    parser = Parser("tabletop", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(SHIPPED)}; all of them if none")
    args = parser.parse_args()
    for name in args.names or SHIPPED:
        if name not in SHIPPED:
            parser.error(f"{name} is not shipped; choose from {', '.join(SHIPPED)}")
        ship(name, WEIGHTS / name)
        print(f"{name}: {WEIGHTS / name}")


main()
