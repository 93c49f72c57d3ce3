//! Keeps pods from speaking as nodes do: the kernel takes a tunnel's packet from whoever sends it, and with it the packet inside, past every
//! policy and with any source.
//!
//! One nftables table of our own in each family:
//!
//! ```text
//! table ip weft-tunnels {
//!     chain pods {
//!         type filter hook prerouting priority raw; policy accept;
//!         iifname <bridge> ip daddr != <pods> udp dport <port> drop
//!         ip daddr <pods> fib daddr type local udp dport <port> drop
//!     }
//! }
//! ```
//!
//! Among pods the port is free. The second rule, for each range, is for nodes' addresses that are of the pods' range, such as the bridge's: they are
//! reached from other nodes' pods by the tunnel, and nodes never speak to each other by them. Fragments are put together before that, as
//! connections are tracked.

use ipnetwork::IpNetwork;
use netlink_packet_netfilter::nftables::{Expressions, InetHookNumber};

use crate::Error;
use crate::nft::{self, Base, Change, FAMILIES, Family, Field};

const TABLE: &str = "weft-tunnels";
const CHAIN: &str = "pods";

/// `NF_IP_PRI_RAW`: before a packet is translated.
const BASE: Base = Base { kind: "filter", hook: InetHookNumber::PreRouting, priority: -300 };

/// Drops what comes by the pods' bridge for the tunnels' port, unless it is for another pod, and what comes for the node itself by an address
/// of the pods' ranges. Whatever the tables held goes.
///
/// # Errors
/// If the kernel refuses (no nftables, not root).
pub fn ensure(bridge: &str, pods: &[IpNetwork], port: u16) -> Result<(), Error> {
    let changes = FAMILIES.into_iter().flat_map(|family| {
        let pods: Vec<_> = pods.iter().filter(|range| Family::of(range.ip()) == family).copied().collect();
        changes(bridge, &pods, port).into_iter().map(move |change| (family, change))
    });
    nft::batch_all("put the rules that guard the tunnels", changes.collect())
}

/// Removes the tables. One that is gone is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove() -> Result<(), Error> {
    nft::remove_tables("remove the rules that guard the tunnels", TABLE)
}

fn changes(bridge: &str, pods: &[IpNetwork], port: u16) -> Vec<Change> {
    // The table is made before it is deleted, so that the deletion can't miss.
    let mut changes = vec![
        nft::new_table(TABLE, 0),
        nft::delete_table(TABLE),
        nft::new_table(TABLE, 0),
        nft::new_chain(TABLE, CHAIN, Some(BASE)),
        nft::new_rule(TABLE, CHAIN, out_of_pods(bridge, pods, port)),
    ];
    changes.extend(pods.iter().map(|range| nft::new_rule(TABLE, CHAIN, into_node(*range, port))));
    changes
}

fn out_of_pods(bridge: &str, pods: &[IpNetwork], port: u16) -> Vec<Expressions> {
    let mut expressions = nft::by_device(bridge);
    expressions.extend(pods.iter().flat_map(|range| nft::address_within(Field::Destination, false, *range)));
    dropped(expressions, port)
}

fn into_node(pods: IpNetwork, port: u16) -> Vec<Expressions> {
    let mut expressions = nft::address_within(Field::Destination, true, pods);
    expressions.extend(nft::for_this_host());
    dropped(expressions, port)
}

fn dropped(mut expressions: Vec<Expressions>, port: u16) -> Vec<Expressions> {
    expressions.extend(nft::to_udp_port(port));
    expressions.push(nft::drop());
    expressions
}
