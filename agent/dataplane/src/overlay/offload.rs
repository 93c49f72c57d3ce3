//! Whether the network card finishes checksums within tunnels. Some cards and drivers that say so don't, or do it wrongly: then ping works
//! between pods and everything else is lost, for a socket of the same machine leaves its checksum to the device.
//!
//! The node sends each peer's bridge a datagram whose checksum is left to the device, to a port where nobody listens; the kernel
//! there says so by ICMP, but only if the checksum is right. If no answer comes it sends another one whose checksum it has finished
//! itself. If only those are answered, several times in a row, the card is broken, and the tunnels' device is told to have checksums
//! finished before.

pub mod exam;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::{Error, Offloads};

use self::exam::{Verdict, examine};
use super::inquiry::Inquiry;
use crate::OVERLAY;

/// UDP port that the datagrams go to, at which nobody should listen: who did would only see them.
pub const PORT: u16 = 8_475;
/// How long a card that is sound is taken as such.
const EVERY: Duration = Duration::from_secs(600);
/// After a look at peers of which none answers anything.
const UNKNOWN_FIRST: Duration = Duration::from_secs(5);
/// Between two peers.
const PAUSE: Duration = Duration::from_millis(50);

/// What may be broken: a link under the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Card {
    /// The tunnels' device, as a new one begins with a clean slate.
    pub overlay: u32,
    /// The link that tunnel packets leave by.
    pub link: u32,
}

/// Who can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness {
    /// The address to ask from: this node's bridge's.
    pub from: IpAddr,
    /// What packets to it go by.
    pub card: Card,
    /// Nothing is left to the card now.
    pub finished_before: bool,
}

/// The peers to ask, by the addresses of their bridges.
pub type Witnesses = BTreeMap<IpAddr, Witness>;

/// A card that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub card: Card,
    /// Who could tell.
    pub witness: IpAddr,
}

/// The self test of a node, until `shutdown`.
pub(crate) fn begin(
    shutdown: CancellationToken,
) -> (Inquiry<Witnesses, Option<Broken>>, Pin<Box<impl Future<Output = ()>>>) {
    let (inquiry, witnesses, found) = Inquiry::open();
    (inquiry, Box::pin(run(witnesses, found, shutdown)))
}

/// Tests until `shutdown`. `broken` gets a card that is found broken, until no packets go by it any more.
pub async fn run(
    mut witnesses: watch::Receiver<Witnesses>,
    broken: watch::Sender<Option<Broken>>,
    shutdown: CancellationToken,
) {
    let court = Court { broken, sound: BTreeSet::new(), confirmed: false, unknown: UNKNOWN_FIRST };
    shutdown.run_until_cancelled(court.run(&mut witnesses)).await;
}

/// What is known of the cards.
struct Court {
    broken: watch::Sender<Option<Broken>>,
    /// Peers that have answered, since all were asked again.
    sound: BTreeSet<(IpAddr, Card)>,
    /// What is done about the card that is broken was seen to help, or not to.
    confirmed: bool,
    /// The next pause if nobody answers.
    unknown: Duration,
}

impl Court {
    /// Ends when nobody tells of peers any more.
    async fn run(mut self, witnesses: &mut watch::Receiver<Witnesses>) {
        loop {
            let all = witnesses.borrow_and_update().clone();
            self.forget(&all);
            let broken = *self.broken.borrow();
            match broken {
                Some(broken) => self.confirm(&broken, &all).await,
                None => self.ask(&all, witnesses).await,
            }
            let pause = self.pause(&all);
            let changed = tokio::time::timeout(pause, witnesses.changed()).await;
            match changed {
                Ok(Err(_)) => return,
                Ok(Ok(())) => {}
                Err(_) => self.sound.clear(),
            }
        }
    }

    /// A card that no packets go by any more is no longer judged; if they do again it is tested again.
    fn forget(&mut self, all: &Witnesses) {
        let used: BTreeSet<Card> = all.values().map(|witness| witness.card).collect();
        self.sound.retain(|(to, card)| all.get(to).is_some_and(|witness| witness.card == *card));
        self.broken
            .send_if_modified(|broken| broken.take_if(|broken| !used.contains(&broken.card)).is_some());
        self.confirmed &= self.broken.borrow().is_some();
    }

    /// Asks those who haven't answered yet, one after the other, as long as they are who there is.
    async fn ask(&mut self, all: &Witnesses, witnesses: &watch::Receiver<Witnesses>) {
        for (to, witness) in all {
            if self.sound.contains(&(*to, witness.card)) {
                continue;
            }
            match examine(witness.from, *to).await {
                Verdict::Sound => drop(self.sound.insert((*to, witness.card))),
                Verdict::Unknown => {}
                // With nothing left to the card there is nothing to be seen of it.
                Verdict::Broken if witness.finished_before => {}
                Verdict::Broken => {
                    self.broken.send_replace(Some(Broken { card: witness.card, witness: *to }));
                    return;
                }
            }
            if witnesses.has_changed().unwrap_or(true) {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Looks once whether what was done about it helps.
    async fn confirm(&mut self, broken: &Broken, all: &Witnesses) {
        let Some(witness) = all.get(&broken.witness) else { return };
        if self.confirmed || !witness.finished_before {
            return;
        }
        match examine(witness.from, broken.witness).await {
            Verdict::Sound => tracing::info!(to = %broken.witness, "datagrams get through the tunnel now"),
            Verdict::Unknown => return,
            Verdict::Broken => {
                tracing::error!(to = %broken.witness, "datagrams don't get through the tunnel, whoever finishes their checksums");
            }
        }
        self.confirmed = true;
    }

    fn pause(&mut self, all: &Witnesses) -> Duration {
        let unknown = match *self.broken.borrow() {
            Some(_) => !self.confirmed,
            None => !all.is_empty() && self.sound.is_empty(),
        };
        if !unknown {
            self.unknown = UNKNOWN_FIRST;
            return EVERY;
        }
        let pause = self.unknown;
        self.unknown = (pause * 2).min(EVERY);
        pause
    }
}

/// Who finishes the checksums of what goes into the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Finisher {
    /// The card, or whoever sends the packet if it can't.
    #[default]
    Card,
    /// The node, as the card is broken.
    Node,
    /// The node, as it was found: by an earlier agent, or an administrator's choice.
    AsFound,
}

impl Finisher {
    /// Of a device that was there or has just been made.
    pub(super) fn of_device() -> Result<Self, Error> {
        Ok(if Offloads::open()?.finishes_checksums(OVERLAY)? { Self::Card } else { Self::AsFound })
    }

    /// Has the device follow.
    pub(super) fn set(&mut self, broken: bool) -> Result<(), Error> {
        let wanted = match (*self, broken) {
            (Self::AsFound, _) => return Ok(()),
            (_, true) => Self::Node,
            (_, false) => Self::Card,
        };
        if wanted != *self {
            Offloads::open()?.finish_checksums(OVERLAY, wanted == Self::Card)?;
            *self = wanted;
        }
        Ok(())
    }
}
