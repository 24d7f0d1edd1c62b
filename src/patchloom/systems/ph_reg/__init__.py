"""PH-Reg: registers put into a trained encoder, which learns what it sees on average over shifted views."""
