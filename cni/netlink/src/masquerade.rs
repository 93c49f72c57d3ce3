//! The masquerade rules: pods that leave the cluster do so with their node's address.
//!
//! One nftables table of our own in each family, so that nobody else's rules are touched and all of it goes with the table:
//!
//! ```text
//! table ip weft {
//!     chain leaving {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr <pods> ip daddr != <pods> ip daddr != <exception> masquerade fully-random
//!     }
//! }
//! ```

use ipnetwork::IpNetwork;
use netlink_packet_netfilter::nftables::{Expressions, InetHookNumber};

use crate::Error;
use crate::nft::{self, Base, Change, FAMILIES, Family, Field};

const TABLE: &str = "weft";
/// No word of nft's language, so that what it lists can be loaded again.
const CHAIN: &str = "leaving";

/// `NF_IP_PRI_NAT_SRC`: behind the decisions of filters.
const BASE: Base = Base { kind: "nat", hook: InetHookNumber::PostRouting, priority: 100 };

/// Puts the rules for the pods' ranges in place of whatever the tables held: what goes from one of them to none of them, and
/// to none of the exceptions, is masqueraded. A family without a range has no table. All or nothing, and no packet sees it
/// half done.
///
/// # Errors
/// If the kernel refuses (no nftables, not root).
pub fn ensure(pods: &[IpNetwork], exceptions: &[IpNetwork]) -> Result<(), Error> {
    let changes = FAMILIES.into_iter().flat_map(|family| {
        family_changes(family, pods, exceptions).into_iter().map(move |change| (family, change))
    });
    nft::batch_all("put the masquerade rules", changes.collect())
}

/// Removes the tables. One that is gone is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove() -> Result<(), Error> {
    nft::remove_tables("remove the masquerade rules", TABLE)
}

fn family_changes(family: Family, pods: &[IpNetwork], exceptions: &[IpNetwork]) -> Vec<Change> {
    let within = |networks: &[IpNetwork]| -> Vec<IpNetwork> {
        networks.iter().copied().filter(|network| Family::of(network.ip()) == family).collect()
    };
    let (pods, exceptions) = (within(pods), within(exceptions));
    // The table is made before it is deleted, so that the deletion can't miss.
    let mut changes = vec![nft::new_table(TABLE, 0), nft::delete_table(TABLE)];
    if pods.is_empty() {
        return changes;
    }
    changes.push(nft::new_table(TABLE, 0));
    changes.push(nft::new_chain(TABLE, CHAIN, Some(BASE)));
    let rules = pods.iter().map(|from| rule(*from, pods.iter().chain(&exceptions)));
    changes.extend(rules.map(|rule| nft::new_rule(TABLE, CHAIN, rule)));
    changes
}

fn rule<'a>(from: IpNetwork, not_to: impl Iterator<Item = &'a IpNetwork>) -> Vec<Expressions> {
    let mut expressions = nft::address_within(Field::Source, true, from);
    expressions.extend(not_to.flat_map(|to| nft::address_within(Field::Destination, false, *to)));
    expressions.push(nft::masquerade());
    expressions
}
