"""What a request asks of the target, checked, mapped to the draft vocabulary and cut to size."""
