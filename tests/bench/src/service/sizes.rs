//! D1 and D2 among thousands of Services: weft's tables, iptables' rules and nftables' maps of the same Services, each on a node of
//! its own, so that none of them costs another's packets anything.

use std::time::Instant;

use anyhow::{Context as _, ensure};

use super::iptables::{self, Backed};
use super::traffic::{Client, Load};
use super::{CLIENTS, EACH, SERIAL, nftables};
use crate::machine::own_seconds;
use crate::report::{Row, Target};
use crate::stage::program::{PATIENCE, Proxy, Whose};
use crate::stage::{self, BACKENDS, Node, TARGET_PORT, filler_address, filler_endpoint, vip};
use crate::stats::{Turns, as_f64, compare, quantile, there_and_back};

const SIZES: [usize; 3] = [1_000, 10_000, 30_000];

/// The sizes to measure, or those that `WEFT_BENCH_SIZES` names with commas between.
fn sizes() -> anyhow::Result<Vec<usize>> {
    let Ok(text) = std::env::var("WEFT_BENCH_SIZES") else { return Ok(SIZES.to_vec()) };
    text.split(',').map(|size| size.trim().parse().with_context(|| format!("{size:?} is no size"))).collect()
}

/// Puts rules of Services into a namespace.
type Loader = fn(&weft_tests_harness::netns::Netns, &[Backed]) -> anyhow::Result<()>;
const LOADERS: [(&str, Loader); 2] = [("iptables", iptables::load_all), ("nftables", nftables::load)];

/// A side: its node, and what a client connects to there.
struct Side {
    name: &'static str,
    client: Client,
    direct: bool,
}

/// The nodes of one size.
struct Field {
    sides: Vec<Side>,
    /// Kept while they are measured.
    _proxy: Proxy,
    _peers: Vec<Node>,
}

impl Field {
    fn new(size: usize) -> anyhow::Result<Self> {
        let mut proxy = Proxy::new(Whose::Weft, size)?;
        let begin = proxy.start()?;
        proxy.wait_until_listed(begin)?;
        let client = proxy.node.client()?;
        client.until(vip(), &stage::pods(), PATIENCE).with_context(|| proxy.said())?;
        let side = |name, node: &Node, direct| -> anyhow::Result<Side> {
            Ok(Side { name, client: node.client()?, direct })
        };
        let mut sides: Vec<Side> =
            vec![side("direct", &proxy.node, true)?, side("weft", &proxy.node, false)?];
        let mut peers = Vec::new();
        for (name, load) in LOADERS {
            let node = Node::new("bx")?;
            let begin = Instant::now();
            let loaded = load(&node.netns, &services(size));
            loaded.with_context(|| format!("{name} at {size} Services"))?;
            eprintln!("{name} rules of {size} Services loaded in {:.1} s", begin.elapsed().as_secs_f64());
            sides.push(side(name, &node, false)?);
            peers.push(node);
        }
        let field = Self { sides, _proxy: proxy, _peers: peers };
        for side in &field.sides {
            field.turn(side, 1, 100).with_context(|| format!("{} at {size} Services", side.name))?;
        }
        Ok(field)
    }

    /// Every connection is answered, and by every backend.
    fn turn(&self, side: &Side, clients: usize, each: usize) -> anyhow::Result<Vec<f64>> {
        let direct =
            || stage::pods().iter().map(|pod| std::net::SocketAddrV4::new(*pod, TARGET_PORT)).collect();
        let addresses = if side.direct { direct() } else { vec![vip()] };
        let outcome = side.client.run(&Load { addresses, clients, each })?;
        ensure!(outcome.backends.len() == BACKENDS, "{}: only {:?} served", side.name, outcome.backends);
        let answered: usize = outcome.backends.values().sum();
        ensure!(answered == clients * each, "{}: {answered} of {} were answered", side.name, clients * each);
        Ok(outcome.micros)
    }

    /// Figures of each side, round by round.
    fn rounds<const N: usize>(
        &self,
        rounds: usize,
        measure: impl Fn(&Side) -> anyhow::Result<[f64; N]>,
    ) -> anyhow::Result<[Vec<Vec<Turns>>; N]> {
        let mut all: [Vec<Vec<Turns>>; N] = std::array::from_fn(|_| vec![Vec::new(); self.sides.len()]);
        for _ in 0..rounds {
            let mut turns: Vec<Vec<[f64; N]>> = vec![Vec::new(); self.sides.len()];
            for side in there_and_back(self.sides.len()) {
                turns[side].push(measure(&self.sides[side])?);
            }
            for (figure, sides) in all.iter_mut().enumerate() {
                for (side, kept) in sides.iter_mut().enumerate() {
                    kept.push(Turns(turns[side][0][figure], turns[side][1][figure]));
                }
            }
        }
        Ok(all)
    }

    fn rows(&self, name: &str, unit: &str, turns: &[Vec<Turns>], target: Target) -> Vec<Row> {
        let others = [0, 2, 3].into_iter();
        let row = |other: usize| {
            let target = if other == 0 { target } else { Target::None };
            Row::compared(name, self.sides[other].name, unit, &compare(&turns[1], &turns[other]), target)
        };
        others.map(row).collect()
    }
}

/// Those that fill the tables, and the one that is asked, which is the last.
fn services(size: usize) -> Vec<Backed> {
    let filler = |number| Backed {
        vip: std::net::SocketAddrV4::new(filler_address(number), vip().port()),
        pods: (0..BACKENDS).map(|endpoint| filler_endpoint(number, endpoint)).collect(),
        port: TARGET_PORT,
    };
    let asked = Backed { vip: vip(), pods: stage::pods(), port: TARGET_PORT };
    (0..size.saturating_sub(1)).map(filler).chain([asked]).collect()
}

/// D1 and D2 at each size.
pub(crate) fn run(ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for size in sizes()? {
        let field = Field::new(size)?;
        if ids.contains(&"D1s") {
            let [p50, p99] = field.rounds(rounds, |side| {
                let micros = field.turn(side, 1, SERIAL)?;
                Ok([quantile(&micros, 0.5), quantile(&micros, 0.99)])
            })?;
            let name = |part: &str| format!("D1 connect → first byte {part}, {size} Services");
            rows.extend(field.rows(&name("p50"), "µs", &p50, Target::AtMost(1.02)));
            rows.extend(field.rows(&name("p99"), "µs", &p99, Target::AtMost(1.02)));
        }
        if ids.contains(&"D2s") {
            let [own] = field.rounds(rounds, |side| {
                let begin = own_seconds()?;
                field.turn(side, CLIENTS, EACH)?;
                Ok([as_f64(CLIENTS * EACH) / (own_seconds()? - begin)])
            })?;
            let name = format!("D2 connections, CPU of client and servers, {size} Services");
            rows.extend(field.rows(&name, "/CPU-s", &own, Target::AtLeast(0.98)));
        }
    }
    Ok(rows)
}
