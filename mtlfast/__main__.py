"""`python -m mtlfast`: what was built (info), what there is (methods), and how fast it is (bench)."""

from mtlfast._cli import main

main()
