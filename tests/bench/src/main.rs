//! `weft-bench`: measures weft against peers and floors, one row each; the ids are those of `docs/spec.md`.
#![forbid(unsafe_code)]

mod cni;
mod convergence;
mod edge;
mod footprint;
mod machine;
mod pair;
mod pods;
mod report;
mod scale;
mod service;
mod stage;
mod stats;
mod subject;
mod upstream;

use std::process::ExitCode;

use clap::Parser;
use weft_tests_harness::require;

use crate::report::Row;

/// Rounds of every ratio: enough for a median whose interval says something.
const ROUNDS: usize = 11;

#[derive(Parser)]
#[command(name = "cargo xtask bench", about = "Measure weft against peers and floors")]
struct Cli {
    /// Which to run; all if none is named. D1s and D2s are D1 and D2 among thousands of Services
    names: Vec<String>,
    /// Rounds of every comparison
    #[arg(long, default_value_t = ROUNDS, value_parser = at_least_three)]
    rounds: usize,
}

fn at_least_three(text: &str) -> Result<usize, String> {
    let rounds: usize = text.parse().map_err(|error| format!("{text:?}: {error}"))?;
    if rounds >= 3 { Ok(rounds) } else { Err("a median needs 3 rounds or more".to_owned()) }
}

/// A benchmark that yields rows.
struct Bench {
    /// The ids of its rows.
    ids: &'static [&'static str],
    needs: &'static [&'static str],
    run: fn(&[&str], usize) -> anyhow::Result<Vec<Row>>,
}

const PROXY: &[&str] = &["root", "bpf", "ip", "weft"];
const CLUSTER: &[&str] = &["root", "bpf", "kubectl", "ip", "weft"];

const BENCHES: &[Bench] = &[
    Bench { ids: &["F3"], needs: &["weft"], run: footprint::size },
    Bench { ids: &["F1", "F2"], needs: CLUSTER, run: footprint::start },
    Bench { ids: &["K1"], needs: CLUSTER, run: pods::run },
    Bench { ids: &["C1", "C2"], needs: &["root", "ip"], run: cni::run },
    Bench { ids: &["C3", "C4"], needs: CLUSTER, run: pair::one_node },
    Bench { ids: &["C5"], needs: &["root", "bpf", "kubectl", "ip", "bridge", "weft"], run: pair::two_nodes },
    Bench { ids: &["C6"], needs: &["root", "bpf", "kubectl", "ip", "curl", "weft"], run: pair::policies },
    Bench {
        ids: &["D1", "D2"],
        needs: &["root", "bpf", "kubectl", "ip", "iptables", "weft"],
        run: service::run,
    },
    Bench {
        ids: &["D1s", "D2s"],
        needs: &["root", "bpf", "ip", "iptables", "nft", "weft"],
        run: service::run_sizes,
    },
    Bench { ids: &["D3"], needs: PROXY, run: convergence::follow },
    Bench { ids: &["D4"], needs: PROXY, run: convergence::cold_start },
    Bench { ids: &["D7"], needs: PROXY, run: convergence::memory },
    Bench { ids: &["D8"], needs: PROXY, run: convergence::cost },
    Bench { ids: &["D9"], needs: PROXY, run: convergence::losses },
    Bench { ids: &["N1"], needs: CLUSTER, run: scale::run },
    Bench { ids: &["D5", "D6"], needs: &["root", "bpf", "ip", "iptables", "artifacts"], run: edge::run },
];

fn main() -> ExitCode {
    let cli = Cli::parse();
    let known: Vec<&str> = BENCHES.iter().flat_map(|bench| bench.ids).copied().collect();
    if let Some(unknown) = cli.names.iter().find(|name| !known.contains(&name.as_str())) {
        eprintln!("error: there is no benchmark {unknown}; there are {}", known.join(" "));
        return ExitCode::FAILURE;
    }
    report::head(&machine::describe());
    let mut code = ExitCode::SUCCESS;
    for bench in BENCHES {
        let wanted: Vec<&str> = bench
            .ids
            .iter()
            .copied()
            .filter(|id| cli.names.is_empty() || cli.names.iter().any(|n| n == id))
            .collect();
        if wanted.is_empty() || !require(&wanted.join(" "), bench.needs) {
            continue;
        }
        match (bench.run)(&wanted, cli.rounds) {
            Ok(rows) => rows.iter().for_each(report::row),
            Err(error) => {
                eprintln!("FAIL {}: {error:#}", wanted.join(" "));
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
