"""Card payments: learn to spot fraud from chargebacks that come days later."""
