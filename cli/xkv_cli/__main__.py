"""`python -m xkv_cli` is `xkv`."""

from xkv_cli.main import main

main()
