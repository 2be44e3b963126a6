"""What a run or a batch tells after the fact: reports, comparisons, variance."""
