//! Answers for load-balancer addresses on the node's link: one node holds each address, and when it falls silent another takes it.
//!
//! A holder has the address on a device of its own ([`DEVICE`]), and its kernel answers ARP for it, or neighbour discovery by a proxy
//! entry at the link's device, also while the agent is away. The others ask for the address several times a second; one that hears
//! nothing for a second takes it and says so to everybody. No node needs to know which others there are.

pub(crate) mod answers;
mod arp;
mod election;
#[doc(hidden)]
pub mod fuzz;
mod link;
mod ndp;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::{Class, Netlink};

use self::election::{Action, Election};
use self::link::Link;

/// The device that carries the addresses: a bridge without ports.
pub const DEVICE: &str = "weft.lb";
/// Class of Services whose load balancer weft is, beside those of no class.
pub(crate) const CLASS: &str = "weft.dev/pool";
/// It never carries a packet; this is Ethernet's usual size.
const MTU_BYTES: u32 = 1500;

/// A device that comes and goes is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// Why addresses can't be announced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a change of devices or addresses.
    #[error(transparent)]
    Netlink(#[from] weft_cni_netlink::Error),
    /// No device has the node's address, or it is none of Ethernet.
    #[error("no Ethernet device has the node's address {0}, so load-balancer addresses can't be announced")]
    NoUplink(IpAddr),
    /// ARP or neighbour discovery can't be spoken.
    #[error("cannot {op} {protocol} on {device}")]
    Speak {
        /// `open`, `send` or `receive`.
        op: &'static str,
        /// Which of the two.
        protocol: &'static str,
        /// The device.
        device: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Holds those of the `wanted` addresses that no other node answers for, until `shutdown`. Addresses stay where they are
/// afterwards; [`cleanup`] takes them away.
///
/// # Errors
/// If the node's device can't be used, or the kernel refuses an address.
pub async fn run(
    node_ip: IpAddr,
    mut wanted: watch::Receiver<BTreeSet<IpAddr>>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    // A cluster without load balancers has neither socket nor device.
    let some = async { wanted.wait_for(|addresses| !addresses.is_empty()).await.is_ok() };
    if !shutdown.run_until_cancelled(some).await.unwrap_or(false) {
        return Ok(());
    }
    let mut announcer = Announcer::open(node_ip)?;
    wanted.mark_changed();
    loop {
        let now = Instant::now();
        let (actions, next) = announcer.election.due(now);
        announcer.apply(&actions).await?;
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = wanted.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let actions = announcer.election.want(&wanted.borrow_and_update().clone(), Instant::now());
                announcer.apply(&actions).await?;
            }
            said = announcer.link.hear() => {
                if let Some((address, mac)) = said? {
                    let actions = announcer.election.heard(address, mac, Instant::now());
                    announcer.apply(&actions).await?;
                }
            }
            () = tokio::time::sleep_until(next.into()) => {}
        }
    }
}

/// Runs [`run`] again when it fails, until `shutdown`: Services go on without their load balancer.
pub(crate) async fn keep_running(
    node_ip: IpAddr,
    wanted: watch::Receiver<BTreeSet<IpAddr>>,
    shutdown: CancellationToken,
) {
    while let Err(error) = run(node_ip, wanted.clone(), shutdown.clone()).await {
        tracing::warn!(%error, source = ?std::error::Error::source(&error), "load-balancer addresses are not announced");
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return;
        }
    }
    shutdown.cancelled().await;
}

/// Removes the device, and with it every address that this node holds, and what answers for them. What is gone already is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn cleanup() -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    let held: BTreeSet<IpAddr> = link::addresses_on(&mut netlink, DEVICE)?.into_iter().collect();
    for (index, address) in netlink.proxies()?.into_iter().filter(|(_, address)| held.contains(address)) {
        netlink.delete_proxy(index, address)?;
    }
    Ok(netlink.delete_link_named(DEVICE)?)
}

struct Announcer {
    link: Link,
    election: Election,
}

impl Announcer {
    /// With the addresses that an earlier agent took.
    fn open(node_ip: IpAddr) -> Result<Self, Error> {
        let mut netlink = Netlink::open()?;
        let link = Link::open(&mut netlink, node_ip)?;
        let held: BTreeSet<IpAddr> = link::addresses_on(&mut netlink, DEVICE)?.into_iter().collect();
        // The node's address may be on another device by now.
        held.iter().try_for_each(|address| link.answer(&mut netlink, *address, true))?;
        let election = Election::new(link.mac(), held, Instant::now());
        Ok(Self { link, election })
    }

    async fn apply(&self, actions: &[Action]) -> Result<(), Error> {
        for action in actions {
            match *action {
                Action::Ask(address, holder) => self.link.ask(address, holder).await?,
                Action::Take(address) => {
                    let mut netlink = Netlink::open()?;
                    let device = netlink.ensure_bridge(DEVICE, MTU_BYTES)?;
                    netlink.add_address(device.index, address.into())?;
                    self.link.answer(&mut netlink, address, true)?;
                    tracing::info!(%address, device = self.link.device().name, "answering for the load-balancer address");
                }
                Action::Announce(address) => self.link.announce(address).await?,
                Action::Give(address) => {
                    let mut netlink = Netlink::open()?;
                    self.link.answer(&mut netlink, address, false)?;
                    give(&mut netlink, address)?;
                    tracing::info!(%address, "no longer answering for the load-balancer address");
                }
            }
        }
        Ok(())
    }
}

fn give(netlink: &mut Netlink, address: IpAddr) -> Result<(), Error> {
    match netlink.link(DEVICE) {
        Ok(device) => Ok(netlink.delete_address(device.index, address.into())?),
        Err(error) if error.class() == Class::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}
