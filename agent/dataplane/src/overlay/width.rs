//! How wide the ways to other nodes are: the largest packet that gets there, where that is less than the first link takes. Between two
//! nodes may be a router with a smaller link behind it, whose errors don't come back, or a switch that drops what it can't hold.
//!
//! The node asks each peer by ICMP echo with packets that nobody may cut, as the tunnel's packets take the way: at first sight, when the
//! route or link there changes, and about once a minute. The peer's kernel answers. What comes back may be cut, so each node finds what
//! holds for what it sends.

mod search;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::search::{Search, Step};
use super::inquiry::Inquiry;
use crate::peers::echo::{Echo, Told};

/// How long a question waits for its answer.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a result is taken as it is.
const EVERY: Duration = Duration::from_secs(60);
/// The same for each way that there is, if that is more: ten a second.
const EVERY_OF_MANY: Duration = Duration::from_millis(100);
/// After a peer that answers nothing.
const SILENT_FIRST: Duration = Duration::from_secs(5);
/// The least time between two questions.
const PAUSE: Duration = Duration::from_millis(10);
/// After a socket failed.
const RETRY: Duration = Duration::from_secs(1);
/// Of those in the process who ask by ICMP echo.
const ECHO_NUMBER: u16 = 2;
/// Packets that every way takes: of IPv4 nobody may count on more (RFC 791 §3.1), of IPv6 no link has less (RFC 8200 §5).
const LEAST_V4_BYTES: u32 = 576;
const LEAST_V6_BYTES: u32 = 1_280;
/// The largest IP packet.
const LARGEST_BYTES: u32 = 65_535;

/// The beginning of a way, as the node knows it. If it is another one, what was found behind it is looked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First {
    /// The device.
    pub device: u32,
    /// The router, if there is one.
    pub gateway: Option<IpAddr>,
    /// The largest packet that it takes.
    pub takes_bytes: u32,
    /// What the whole way took when an earlier agent measured it.
    pub believed_bytes: Option<u32>,
}

/// The ways to be measured, by the other end.
pub type Ways = BTreeMap<IpAddr, First>;
/// What the narrow ones take, likewise.
pub type Widths = BTreeMap<IpAddr, u32>;

/// The measuring of a node's ways, until `shutdown`.
pub(crate) fn begin(
    shutdown: CancellationToken,
) -> (Inquiry<Ways, Widths>, Pin<Box<impl Future<Output = ()>>>) {
    let (inquiry, ways, found) = Inquiry::open();
    (inquiry, Box::pin(run(ways, found, shutdown)))
}

/// Measures until `shutdown`. `found` gets the ways that are narrower than they begin.
pub async fn run(mut ways: watch::Receiver<Ways>, found: watch::Sender<Widths>, shutdown: CancellationToken) {
    let mut survey = Survey { found, ways: BTreeMap::new(), asked: Instant::now() };
    loop {
        match shutdown.run_until_cancelled(survey.run(&mut ways)).await {
            None | Some(Ok(())) => return,
            Some(Err(error)) => {
                tracing::warn!(%error, "ways to other nodes can't be measured, will be tried again");
            }
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return;
        }
    }
}

/// A way that is measured.
#[derive(Debug)]
struct Way {
    first: First,
    least_bytes: u32,
    /// What was found last, if it is less than the first link takes.
    narrow: Option<u32>,
    /// The search, and the number of its question once that is asked.
    search: Option<(Search, Option<u16>)>,
    /// When something is to be done.
    due: Instant,
    /// Of the next look after a peer that was silent.
    silent: Duration,
}

impl Way {
    fn new(to: IpAddr, first: First, narrow: Option<u32>, now: Instant) -> Self {
        let least_bytes = if to.is_ipv4() { LEAST_V4_BYTES } else { LEAST_V6_BYTES };
        let narrow = narrow.filter(|narrow| *narrow < first.takes_bytes);
        Self { first, least_bytes, narrow, search: None, due: now, silent: SILENT_FIRST }
    }

    /// The size to ask with now. A question that still waits got no answer in time.
    fn due(&mut self, now: Instant, every: Duration) -> Option<u32> {
        let step = match &mut self.search {
            Some((search, Some(_))) => search.missed(),
            Some((search, None)) => Step::Ask(search.asks()),
            None => {
                let search = Search::new(self.least_bytes, self.first.takes_bytes, self.narrow);
                let asks = search.asks();
                self.search = Some((search, None));
                Step::Ask(asks)
            }
        };
        self.follow(step, now, every);
        match step {
            Step::Ask(bytes) => Some(bytes),
            Step::Found(_) | Step::Silent => None,
        }
    }

    fn asked(&mut self, number: u16, now: Instant) {
        if let Some((_, waits)) = &mut self.search {
            *waits = Some(number);
            self.due = now + PATIENCE;
        }
    }

    /// Something came back about a question.
    fn heard(&mut self, number: u16, now: Instant, every: Duration, what: impl FnOnce(&mut Search) -> Step) {
        if let Some((search, waits)) = &mut self.search
            && *waits == Some(number)
        {
            let step = what(search);
            self.follow(step, now, every);
        }
    }

    fn follow(&mut self, step: Step, now: Instant, every: Duration) {
        match step {
            Step::Ask(_) => {
                if let Some((_, waits)) = &mut self.search {
                    *waits = None;
                }
                self.due = now;
            }
            Step::Found(bytes) => {
                self.narrow = (bytes < self.first.takes_bytes).then_some(bytes);
                (self.search, self.silent) = (None, SILENT_FIRST);
                self.due = now + every;
            }
            // What was found before may still be so.
            Step::Silent => {
                self.search = None;
                self.due = now + self.silent.min(every);
                self.silent = (self.silent * 2).min(every);
            }
        }
    }
}

/// All ways that are measured.
struct Survey {
    found: watch::Sender<Widths>,
    ways: BTreeMap<IpAddr, Way>,
    /// When the last question was.
    asked: Instant,
}

impl Survey {
    /// Ends when nobody tells of ways any more.
    async fn run(&mut self, ways: &mut watch::Receiver<Ways>) -> io::Result<()> {
        self.take_in(&ways.borrow_and_update().clone());
        while self.ways.is_empty() {
            // Where nothing is measured, nothing is opened.
            if ways.changed().await.is_err() {
                return Ok(());
            }
            self.take_in(&ways.borrow_and_update().clone());
        }
        let mut echo = Echo::open_to_errors(ECHO_NUMBER)?;
        loop {
            let due = self.ways.values().map(|way| way.due).min();
            let turn = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.max(self.asked + PAUSE)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = ways.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.take_in(&ways.borrow_and_update().clone());
                }
                ready = echo.ready() => ready?,
                () = turn => self.ask_next(&mut echo),
            }
            while let Some(told) = echo.try_told()? {
                self.told(&told);
            }
            while let Some((from, number)) = echo.try_answer()? {
                self.answered(from, number);
            }
            self.tell();
        }
    }

    /// Ways that are as they were keep what is known of them; of one that begins elsewhere what was found holds until there is better.
    fn take_in(&mut self, ways: &Ways) {
        let now = Instant::now();
        let wanted = ways.iter().filter_map(|(to, first)| {
            let first = First { takes_bytes: first.takes_bytes.min(LARGEST_BYTES), ..*first };
            let way = match self.ways.remove(to) {
                Some(way) if way.first == first => way,
                Some(before) => Way::new(*to, first, before.narrow, now),
                None => Way::new(*to, first, first.believed_bytes, now),
            };
            // Of what takes no more than everybody does nothing can be learned.
            (first.takes_bytes > way.least_bytes).then_some((*to, way))
        });
        self.ways = wanted.collect();
    }

    fn every(&self) -> Duration {
        EVERY.max(EVERY_OF_MANY * u32::try_from(self.ways.len()).unwrap_or(u32::MAX))
    }

    fn ask_next(&mut self, echo: &mut Echo) {
        let (now, every) = (Instant::now(), self.every());
        let Some((to, way)) = self.ways.iter_mut().min_by_key(|(_, way)| way.due) else { return };
        if let Some(bytes) = way.due(now, every) {
            let number = echo.ask_whole(*to, usize::try_from(bytes).unwrap_or(usize::MAX));
            way.asked(number, now);
            self.asked = now;
        }
    }

    fn answered(&mut self, from: IpAddr, number: u16) {
        let every = self.every();
        if let Some(way) = self.ways.get_mut(&from) {
            way.heard(number, Instant::now(), every, Search::answered);
        }
    }

    fn told(&mut self, told: &Told) {
        let every = self.every();
        if let Some(way) = self.ways.get_mut(&told.to) {
            way.heard(told.number, Instant::now(), every, |search| search.told(told.takes_bytes));
        }
    }

    fn tell(&self) {
        let found = self.ways.iter().filter_map(|(to, way)| Some((*to, way.narrow?)));
        let found: Widths = found.collect();
        self.found.send_if_modified(|before| {
            let news = *before != found;
            *before = found;
            news
        });
    }
}

/// The ways whose width is another one now, with what they take if they are narrow.
pub(crate) fn turns(before: &Widths, now: &Widths) -> Vec<(IpAddr, Option<u32>)> {
    let all: BTreeSet<&IpAddr> = before.keys().chain(now.keys()).collect();
    let turned = all.into_iter().filter(|to| before.get(to) != now.get(to));
    turned.map(|to| (*to, now.get(to).copied())).collect()
}

#[cfg(test)]
mod tests;
