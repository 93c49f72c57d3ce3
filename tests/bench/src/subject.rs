//! The clusters that are measured: weft's and, if `WEFT_BENCH_UPSTREAM` names a folder with upstream's programs, upstream's. Both are
//! asked by the same client in the same way, one after the other: nothing of the one runs while the other is measured.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::Netns;

use crate::machine::busy_seconds;
use crate::report::{Row, Target};
use crate::stats::{Turns, estimate, there_and_back};
use crate::upstream::{self, PEER, Upstream};

/// A machine rests when its processors are busy for less than this part of one of them.
const RESTS_BELOW: f64 = 0.25;
/// For how long.
const RESTS_FOR: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// A running cluster of one node, in a network namespace of its own.
pub(crate) trait Subject {
    /// The namespace that stands for the machine.
    fn netns(&self) -> &Netns;
    /// A folder for files that a measurement needs.
    fn folder(&self) -> &Path;
    /// A `kubectl` command as the administrator.
    fn kubectl_command(&self, args: &[&str]) -> anyhow::Result<Command>;
    /// Imports an image's archive into the node.
    fn import(&self, archive: &Path) -> anyhow::Result<()>;
    /// The end of what its programs have said.
    fn said(&self) -> String;
    /// Ends it and removes all that it made.
    fn end(&mut self) -> anyhow::Result<()>;

    /// Runs kubectl and answers its standard output.
    fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.kubectl_command(args)?.stdin(Stdio::null()).output().context("run kubectl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies a manifest given as text.
    fn apply(&self, manifest: &str) -> anyhow::Result<()> {
        let path = self.folder().join("apply.yaml");
        std::fs::write(&path, manifest)?;
        self.kubectl(&["apply", "-f", &path.to_string_lossy()]).map(drop)
    }
}

impl Subject for Cluster {
    fn netns(&self) -> &Netns {
        &self.netns
    }

    fn folder(&self) -> &Path {
        self.data_dir()
    }

    fn kubectl_command(&self, args: &[&str]) -> anyhow::Result<Command> {
        Cluster::kubectl_command(self, args)
    }

    fn import(&self, archive: &Path) -> anyhow::Result<()> {
        Cluster::import(self, archive)
    }

    fn said(&self) -> String {
        self.log_tail()
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.purge()
    }
}

/// Whose cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Weft,
    Upstream,
}

impl Whose {
    /// Those that are to be measured, in the order of their turns: there and back if there are two. What upstream needs must be here.
    pub(crate) fn turns() -> anyhow::Result<Vec<Self>> {
        if std::env::var_os(PEER).is_none() {
            return Ok(vec![Self::Weft]);
        }
        upstream::programs()?;
        Ok(there_and_back(2).map(|side| [Self::Weft, Self::Upstream][side]).collect())
    }

    /// Starts a cluster and waits until its node is Ready.
    fn start(self, label: &str) -> anyhow::Result<Box<dyn Subject>> {
        Ok(match self {
            Self::Weft => Box::new(Cluster::start(label, &[])?),
            Self::Upstream => Box::new(Upstream::start(label)?),
        })
    }
}

/// What was measured of both, round by round; of upstream nothing if it is not here.
pub(crate) struct Sides<const N: usize> {
    weft: Vec<Vec<[f64; N]>>,
    upstream: Vec<Vec<[f64; N]>>,
}

impl<const N: usize> Sides<N> {
    /// Nothing measured yet.
    pub(crate) fn new() -> Self {
        Self { weft: Vec::new(), upstream: Vec::new() }
    }

    /// One turn of each round.
    pub(crate) fn push(&mut self, whose: Whose, figures: Vec<[f64; N]>) {
        match whose {
            Whose::Weft => self.weft.push(figures),
            Whose::Upstream => self.upstream.push(figures),
        }
    }

    /// A row of one of the figures: ours alone, or how many times more upstream's is. `alone` and `times` are what was promised of either.
    pub(crate) fn row(&self, figure: usize, name: &str, unit: &str, alone: Target, times: Target) -> Row {
        if self.upstream.is_empty() {
            let all: Vec<f64> = self.weft.iter().flatten().map(|turn| turn[figure]).collect();
            return Row::figure(name, estimate(&all), unit, alone);
        }
        Row::times(
            name,
            "upstream",
            unit,
            [&rounds(&self.weft, figure), &rounds(&self.upstream, figure)],
            times,
        )
    }
}

/// A round has two turns of either side.
fn rounds<const N: usize>(turns: &[Vec<[f64; N]>], figure: usize) -> Vec<Turns> {
    let [first, second] = turns else { return Vec::new() };
    first.iter().zip(second).map(|(first, second)| Turns(first[figure], second[figure])).collect()
}

/// Takes the turns of all rounds in few clusters, as to start one and to fill it takes long: weft's first turns, upstream's first and
/// second ones, weft's second ones. So a machine that gets faster or slower meanwhile does so for both.
pub(crate) fn measure<T, const N: usize>(
    label: &str,
    rounds: usize,
    prepare: impl Fn(&dyn Subject) -> anyhow::Result<T>,
    turn: impl Fn(&dyn Subject, &T) -> anyhow::Result<[f64; N]>,
) -> anyhow::Result<Sides<N>> {
    let order = Whose::turns()?;
    let mut sides = Sides::new();
    for turns in order.chunk_by(|one, next| one == next) {
        let whose = turns[0];
        let mut subject = whose.start(label)?;
        let work = || -> anyhow::Result<Vec<[f64; N]>> {
            let prepared = prepare(&*subject)?;
            let mut figures = Vec::new();
            for number in 0..rounds * turns.len() {
                if order.len() > 1 {
                    rest();
                }
                let measured = turn(&*subject, &prepared).with_context(|| format!("turn {}", number + 1))?;
                eprintln!("{label}, {whose:?}, turn {}: {measured:.2?}", number + 1);
                figures.push(measured);
            }
            Ok(figures)
        };
        let figures = work().with_context(|| format!("{whose:?} said: {}", subject.said()))?;
        subject.end()?;
        figures.chunks(rounds).for_each(|half| sides.push(whose, half.to_vec()));
    }
    Ok(sides)
}

/// Waits until what the last turn left to be done is done, on either side: a cluster cleans up after pods that the API no longer has.
fn rest() {
    let busy = || busy_seconds().unwrap_or(f64::NAN);
    let (mut since, mut before) = (Instant::now(), busy());
    let rested = weft_tests_harness::wait_until("the machine rests", PATIENCE, || {
        let took = since.elapsed();
        if took < RESTS_FOR {
            return Ok(None);
        }
        let share = (busy() - before) / took.as_secs_f64();
        (since, before) = (Instant::now(), busy());
        Ok((share < RESTS_BELOW).then_some(()))
    });
    if let Err(error) = rested {
        eprintln!("measured all the same: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_pairs_the_turns_of_both_its_halves() {
        let halves = [vec![[1.0, 10.0], [2.0, 20.0]], vec![[3.0, 30.0], [4.0, 40.0]]];
        let pairs: Vec<(f64, f64)> = rounds(&halves, 1).iter().map(|turns| (turns.0, turns.1)).collect();
        assert_eq!(pairs, [(10.0, 30.0), (20.0, 40.0)]);
    }

    #[test]
    fn upstream_is_said_to_take_so_many_times_as_much() {
        let mut sides = Sides::new();
        for seconds in [1.0, 1.0] {
            sides.push(Whose::Weft, vec![[seconds]; 3]);
            sides.push(Whose::Upstream, vec![[8.0 * seconds]; 3]);
        }
        let row = format!("{:?}", sides.row(0, "name", "s", Target::None, Target::AtLeast(10.0)));
        for part in [r#"ours: "1.00 s""#, r#"peer: "upstream: 8.00 s""#, "8.000 [8.000, 8.000]", "MISSED"] {
            assert!(row.contains(part), "{part} is not in {row}");
        }
    }
}
