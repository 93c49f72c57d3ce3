//! Every client, every address of a Service, every traffic policy, every protocol, every place of an endpoint: who answers, who is refused,
//! and which client the server sees. [`rules`] has what upstream says; this asks a cluster of two nodes.

mod bed;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::ensure;
use weft_tests_conformance::{Bed, Outcome, Request, Site};

use crate::bed::Stage;
use crate::rules::{Cell, Client, Expected, Source};

/// Rounds of questions for cells that aren't right yet: the first may come before the last Service is everywhere.
const ROUNDS: u32 = 8;
/// Questions of a cell that is to be answered.
const QUESTIONS: u32 = 3;
/// How long an answer may take on a busy machine, and how long none must come for a drop.
const ANSWER_MS: u32 = 3_000;
const DROP_MS: u32 = 1_000;

const FLAGS: [&str; 6] =
    ["--nodes", "2", "--cluster-cidr", "10.42.0.0/16,fd42::/56", "--service-cidr", "10.43.0.0/16,fd43::/112"];

#[test]
fn every_cell() -> anyhow::Result<()> {
    let Some(bed) = Bed::start("conformance::matrix", "matrix", &FLAGS)? else { return Ok(()) };
    bed.run("matrix", async |site| {
        let stage = Stage::build(&bed, &site).await?;
        let mut left = Cell::all();
        let (count, mut wrong) = (left.len(), BTreeMap::new());
        for _ in 0..ROUNDS {
            wrong = ask(&site, &stage, &left).await?;
            left = wrong.keys().copied().collect();
            if left.is_empty() {
                break;
            }
        }
        stage.clear(&site).await?;
        eprintln!("{} of {count} cells are right", count - wrong.len());
        let report: Vec<String> = wrong.into_values().collect();
        ensure!(report.is_empty(), "{} of {count} cells are wrong:\n{}", report.len(), report.join("\n"));
        Ok(())
    })
}

/// Asks all cells, each client's at once; answers the wrong ones with what was seen.
async fn ask(site: &Site, stage: &Stage, cells: &[Cell]) -> anyhow::Result<BTreeMap<Cell, String>> {
    let mut wrong = BTreeMap::new();
    for client in Client::ALL {
        let own: Vec<&Cell> = cells.iter().filter(|cell| cell.client == client).collect();
        if own.is_empty() {
            continue;
        }
        let requests: Vec<Request> = own.iter().map(|cell| request(stage, cell)).collect();
        let outcomes = stage.places[&client].ask(site, &requests).await?;
        for ((cell, request), outcomes) in own.into_iter().zip(&requests).zip(&outcomes) {
            let expected = cell.expected();
            let as_expected = outcomes.iter().filter(|outcome| fits(stage, cell, &expected, outcome)).count();
            if as_expected != request.count as usize {
                wrong.insert(
                    *cell,
                    format!("{cell:?} at {}: expected {expected:?}, saw {outcomes:?}", request.to),
                );
            }
        }
    }
    Ok(wrong)
}

fn request(stage: &Stage, cell: &Cell) -> Request {
    let (count, timeout_ms) = match cell.expected() {
        Expected::By(..) => (QUESTIONS, ANSWER_MS),
        Expected::Refused => (1, ANSWER_MS),
        Expected::Dropped | Expected::Nothing => (1, DROP_MS),
    };
    Request { way: cell.way, to: stage.address(cell), count, timeout_ms }
}

fn fits(stage: &Stage, cell: &Cell, expected: &Expected, outcome: &Outcome) -> bool {
    match (expected, outcome) {
        (Expected::By(names, source), Outcome::Answered { by, client }) => {
            names.contains(by.as_str()) && sources(stage, cell, *source).contains(&client.ip())
        }
        (Expected::Refused | Expected::Nothing, Outcome::Refused)
        | (Expected::Dropped | Expected::Nothing, Outcome::Timeout) => true,
        (
            Expected::By(..) | Expected::Refused | Expected::Dropped | Expected::Nothing,
            Outcome::Answered { .. }
            | Outcome::Refused
            | Outcome::Timeout
            | Outcome::Unreachable
            | Outcome::Failed(_),
        ) => false,
    }
}

fn sources(stage: &Stage, cell: &Cell, source: Source) -> BTreeSet<IpAddr> {
    let mut addresses = stage.addresses[&cell.client].clone();
    if source == Source::KeptOrNode {
        addresses.extend([Client::Node, Client::FarNode].iter().flat_map(|node| &stage.addresses[node]));
    }
    addresses
}
