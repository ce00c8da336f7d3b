"""The pages that trainings leave, made of plain data: of one run, and of several side by side."""
