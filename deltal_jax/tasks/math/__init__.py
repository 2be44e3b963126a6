"""Mathematics. Workers import this package: nothing heavy is imported here."""
