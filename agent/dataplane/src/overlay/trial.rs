//! Whether packets with pods' addresses get over a link. A network may drop what comes from addresses that it hasn't given out, and
//! says so to nobody.
//!
//! The node asks by ICMP echo from its bridge's address to the other node's bridge, straight over the link and as large as the link
//! takes; the answer comes by whichever way the other node has chosen. So each node decides for what it sends.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use super::inquiry::Inquiry;
use crate::peers::echo::Echo;

pub use crate::peers::echo::Question;

/// Answers in a row that prove a way, and questions in a row without one that disprove it.
const ENOUGH: u8 = 3;
/// How often each way is tried, unless there are so many that [`PAUSE`] holds.
const EVERY: Duration = Duration::from_secs(1);
/// The least time between two questions.
const PAUSE: Duration = Duration::from_millis(10);
/// After a socket failed.
const RETRY: Duration = Duration::from_secs(1);
/// Of those in the process who ask by ICMP echo.
const ECHO_NUMBER: u16 = 1;

/// A question for each range of pods on this node's links.
pub type Trials = BTreeMap<IpNetwork, Question>;

/// The trials of a node, until `shutdown`.
pub(crate) fn begin(
    shutdown: CancellationToken,
) -> (Inquiry<Trials, BTreeSet<IpNetwork>>, Pin<Box<impl Future<Output = ()>>>) {
    let (inquiry, trials, found) = Inquiry::open();
    (inquiry, Box::pin(run(trials, found, shutdown)))
}

/// Tries until `shutdown`. `proven` gets the ranges whose pods packets get to.
pub async fn run(
    mut trials: watch::Receiver<Trials>,
    proven: watch::Sender<BTreeSet<IpNetwork>>,
    shutdown: CancellationToken,
) {
    let mut court = Court { proven, ways: BTreeMap::new(), last: None };
    loop {
        match shutdown.run_until_cancelled(court.run(&mut trials)).await {
            None | Some(Ok(())) => return,
            Some(Err(error)) => tracing::warn!(%error, "links can't be tried, will be tried again"),
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return;
        }
    }
}

/// A way that is tried.
#[derive(Clone, Copy, Debug)]
struct Way {
    question: Question,
    /// The number of the question that waits for its answer.
    waits: Option<u16>,
    answered: u8,
    missed: u8,
    proven: bool,
}

impl Way {
    fn new(question: Question) -> Self {
        Self { question, waits: None, answered: 0, missed: 0, proven: false }
    }

    /// The next question goes out: one that still waits is lost.
    fn asked(&mut self, number: u16) {
        if self.waits.replace(number).is_some() {
            self.answered = 0;
            self.missed = self.missed.saturating_add(1);
            self.proven &= self.missed < ENOUGH;
        }
    }

    fn answered(&mut self, number: u16) {
        if self.waits == Some(number) {
            self.waits = None;
            self.missed = 0;
            self.answered = self.answered.saturating_add(1);
            self.proven |= self.answered >= ENOUGH;
        }
    }
}

/// All ways that are tried.
struct Court {
    proven: watch::Sender<BTreeSet<IpNetwork>>,
    ways: BTreeMap<IpNetwork, Way>,
    /// The range that was asked about last.
    last: Option<IpNetwork>,
}

impl Court {
    /// Ends when nobody tells of ways any more.
    async fn run(&mut self, trials: &mut watch::Receiver<Trials>) -> io::Result<()> {
        self.take_in(&trials.borrow_and_update().clone());
        if self.ways.is_empty() {
            // Where nothing is tried, nothing is opened.
            if trials.changed().await.is_err() {
                return Ok(());
            }
            self.take_in(&trials.borrow_and_update().clone());
        }
        let mut echo = Echo::open(ECHO_NUMBER)?;
        let mut pause = EVERY;
        let mut ticks = interval_at(Instant::now(), pause);
        loop {
            let wanted = self.pause();
            if wanted != pause {
                pause = wanted;
                ticks = interval_at(Instant::now() + pause, pause);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            }
            tokio::select! {
                changed = trials.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.take_in(&trials.borrow_and_update().clone());
                }
                ready = echo.ready() => ready?,
                _ = ticks.tick() => self.ask_next(&mut echo),
            }
            while let Some((from, number)) = echo.try_answer()? {
                self.answered(from, number);
            }
            self.tell();
        }
    }

    /// Ways that are as they were keep what is known of them.
    fn take_in(&mut self, trials: &Trials) {
        self.ways.retain(|range, way| trials.get(range) == Some(&way.question));
        for (range, question) in trials {
            self.ways.entry(*range).or_insert_with(|| Way::new(*question));
        }
    }

    fn pause(&self) -> Duration {
        let ways = u32::try_from(self.ways.len()).unwrap_or(u32::MAX).max(1);
        (EVERY / ways).max(PAUSE)
    }

    fn ask_next(&mut self, echo: &mut Echo) {
        let next = self.last.and_then(|last| {
            use std::ops::Bound::{Excluded, Unbounded};
            self.ways.range((Excluded(last), Unbounded)).next().map(|(range, _)| *range)
        });
        self.last = next.or_else(|| self.ways.keys().next().copied());
        if let Some(way) = self.last.and_then(|range| self.ways.get_mut(&range)) {
            let number = echo.ask_by(&way.question);
            way.asked(number);
        }
    }

    fn answered(&mut self, from: IpAddr, number: u16) {
        if let Some(way) = self.ways.values_mut().find(|way| way.question.to == from) {
            way.answered(number);
        }
    }

    fn tell(&self) {
        let proven = self.ways.iter().filter(|(_, way)| way.proven).map(|(range, _)| *range);
        let proven: BTreeSet<IpNetwork> = proven.collect();
        self.proven.send_if_modified(|before| {
            for range in proven.difference(before) {
                tracing::info!(%range, "packets to these pods get over the link: no tunnel is used");
            }
            for range in before.difference(&proven) {
                tracing::warn!(%range, "packets to these pods don't get over the link: the tunnel is used");
            }
            let news = *before != proven;
            *before = proven;
            news
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_proven_by_answers_in_a_row_and_disproven_likewise() {
        let question = Question {
            to: [10, 42, 1, 1].into(),
            from: [10, 42, 0, 1].into(),
            device: 2,
            packet_bytes: 1_500,
        };
        let mut way = Way::new(question);
        // A dot is a question, an x its answer, an o an answer to another question.
        let rows = [
            (".x.x", false),
            (".", false),
            (".x.x", false),
            (".x", true),
            (".o.o.x", true),
            ("...", true),
            (".", false),
            ("x.x", false),
            (".x", true),
        ];
        let mut number = 0;
        for (at, (row, proven)) in rows.into_iter().enumerate() {
            for sign in row.chars() {
                match sign {
                    '.' => {
                        number += 1;
                        way.asked(number);
                    }
                    'x' => way.answered(number),
                    _ => way.answered(number - 1),
                }
            }
            assert_eq!(way.proven, proven, "row {at}: {way:?}");
        }
    }
}
