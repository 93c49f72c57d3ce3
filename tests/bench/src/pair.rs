//! C3 to C6: two pods that talk to each other, on one node and on two, against the reference bridge plugin, against wires without a bridge
//! or without a tunnel, and with many NetworkPolicies against none.
//!
//! All sides have the same load, clients and servers being threads of this process within the pods' namespaces, and all have
//! packets of 1450 bytes, but for C5 by plain routes, where they are of 1500.

mod load;
mod ways;

use std::time::Instant;

use anyhow::ensure;

use crate::machine::{busy_seconds, own_seconds};
use crate::report::{Row, Target};
use crate::service::{QUIET, idle_load};
use crate::stats::{Turns, as_f64, compare, there_and_back};
use load::Work;
use ways::{Between, Way};

/// What the CPU of a turn is measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Machine,
    Process,
}

/// A figure of a benchmark: a load, and what is promised of it against each of the other sides.
struct Figure<'a> {
    name: &'a str,
    work: Work,
    targets: Vec<Target>,
}

/// C3 and C4.
pub(crate) fn one_node(ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let ways = [ways::weft(&[], ways::Policies::None)?, ways::bridge()?, ways::wire()?];
    let mut rows = Vec::new();
    if ids.contains(&"C3") {
        let targets = vec![Target::AtLeast(1.25), Target::AtLeast(0.97)];
        let figure = Figure { name: "C3 request/response, pods of a node", work: Work::Requests, targets };
        rows.extend(measure(&figure, &ways, rounds)?);
    }
    if ids.contains(&"C4") {
        let targets = vec![Target::None, Target::AtLeast(0.98)];
        let figure = Figure { name: "C4 stream, pods of a node", work: Work::Stream, targets };
        rows.extend(measure(&figure, &ways, rounds)?);
    }
    end(ways)?;
    Ok(rows)
}

/// What is promised against no tunnel.
const NEAR: Target = Target::AtLeast(0.93);

/// C5: as it is by default, then by plain routes.
pub(crate) fn two_nodes(_: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let tunnel = [
        ways::weft(&["--nodes", "2"], ways::Policies::None)?,
        ways::hosts(Between::Tunnel)?,
        ways::hosts(Between::Routes)?,
    ];
    let mut rows =
        across("pods of two nodes", [&[Target::AtLeast(1.4), NEAR], &[Target::None, NEAR]], &tunnel, rounds)?;
    end(tunnel)?;
    let routes = [
        ways::weft(&["--nodes", "2", "--routing", "native"], ways::Policies::None)?,
        ways::hosts(Between::RoutesOfLink)?,
    ];
    rows.extend(across("pods of two nodes, native routing", [&[NEAR], &[NEAR]], &routes, rounds)?);
    end(routes)?;
    Ok(rows)
}

/// Requests and streams between two nodes, each with what is promised against the other ways.
fn across(what: &str, promised: [&[Target]; 2], ways: &[Way], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let works = [("request/response", Work::Requests), ("stream", Work::Stream)];
    for ((name, work), targets) in works.into_iter().zip(promised) {
        let figure = Figure { name: &format!("C5 {name}, {what}"), work, targets: targets.to_vec() };
        rows.extend(measure(&figure, ways, rounds)?);
    }
    Ok(rows)
}

/// C6.
pub(crate) fn policies(_: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let none = ways::weft(&[], ways::Policies::None)?;
    let own = ways::weft(&[], ways::Policies::OfThePair)?;
    let others = ways::weft(&[], ways::Policies::OfOthers)?;
    let mut rows = Vec::new();
    for (name, with) in [
        ("C6 request/response, 1,000 policies of other pods", others),
        ("C6 request/response, 1,000 policies of the two pods", own),
    ] {
        let target = if name.contains("other") { Target::AtLeast(0.99) } else { Target::None };
        let figure = Figure { name, work: Work::Requests, targets: vec![target] };
        let pair = [&with, &none];
        rows.extend(measure(&figure, &pair, rounds)?);
        with.end()?;
    }
    none.end()?;
    Ok(rows)
}

fn end(ways: impl IntoIterator<Item = Way>) -> anyhow::Result<()> {
    ways.into_iter().try_for_each(Way::end)
}

/// Takes turns; the first way is ours.
fn measure<W: AsRef<Way>>(figure: &Figure<'_>, ways: &[W], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let elsewhere = idle_load()?;
    let mut machine: Vec<Vec<Turns>> = ways.iter().map(|_| Vec::new()).collect();
    let mut process = machine.clone();
    for way in ways {
        // A first turn makes neighbours, routes and buffers.
        turn(figure.work, way.as_ref(), elsewhere)?;
    }
    for _ in 0..rounds {
        let mut turns: Vec<Vec<[f64; 2]>> = ways.iter().map(|_| Vec::new()).collect();
        for side in there_and_back(ways.len()) {
            turns[side].push(turn(figure.work, ways[side].as_ref(), elsewhere)?);
        }
        for (side, taken) in turns.iter().enumerate() {
            let [a, b] = [taken[0], taken[1]];
            machine[side].push(Turns(a[0], b[0]));
            process[side].push(Turns(a[1], b[1]));
        }
    }
    let mut rows = Vec::new();
    for (other, target) in (1..ways.len()).zip(&figure.targets) {
        let peer = ways[other].as_ref().name;
        let row = |by: By, turns: &[Vec<Turns>], target| {
            let cpu = if by == By::Machine { "whole machine's CPU" } else { "CPU of client and server" };
            let name = format!("{}, {cpu}", figure.name);
            Row::compared(&name, peer, figure.work.unit(), &compare(&turns[0], &turns[other]), target)
        };
        rows.push(row(By::Process, &process, Target::None));
        if elsewhere <= QUIET {
            rows.push(row(By::Machine, &machine, *target));
        } else {
            eprintln!(
                "{}: other work took {elsewhere:.2} processors, so no row of the whole machine's CPU: it would say nothing",
                figure.name
            );
        }
    }
    Ok(rows)
}

/// What one turn does per second of CPU: of the whole machine, less what else runs on it, and of this process.
fn turn(work: Work, way: &Way, elsewhere: f64) -> anyhow::Result<[f64; 2]> {
    let (busy, mine, begin) = (busy_seconds()?, own_seconds()?, Instant::now());
    let done = work.run(&way.client, way.server.address)?;
    let idle = elsewhere * begin.elapsed().as_secs_f64();
    let (busy, mine) = (busy_seconds()? - busy - idle, own_seconds()? - mine);
    ensure!(done == work.expected(), "{}: {done} of {} were done", way.name, work.expected());
    let amount = work.amount(as_f64(done));
    Ok([amount / busy.max(f64::EPSILON), amount / mine.max(f64::EPSILON)])
}
