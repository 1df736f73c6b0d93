"""Options of every test run; nothing else."""

import os


def pytest_addoption(parser):
    group = parser.getgroup("ringwall")
    group.addoption("--seed", help="seed of every simulation (default: CRC-32 of the test's own name)")
    group.addoption("--waves", action="store_true", help="record every signal of every simulation")
    group.addoption("--sim", choices=["icarus", "verilator"], help="simulator (default: icarus)")


def pytest_configure(config):
    for option, variable in (("seed", "SEED"), ("sim", "SIM")):
        if config.getoption(option):
            os.environ[variable] = config.getoption(option)
    if config.getoption("waves"):
        os.environ["WAVES"] = "1"
