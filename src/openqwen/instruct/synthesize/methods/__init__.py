"""The methods of synthesis, one a file; `openqwen synthesize METHOD` runs one."""
