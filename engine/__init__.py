"""What a step is: plan, program, engine, memory, record. No host, no paper."""
