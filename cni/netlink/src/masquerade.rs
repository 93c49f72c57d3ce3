//! The masquerade rules: pods that leave the cluster do so with their node's address.
//!
//! One nftables table of our own in each family, so that nobody else's rules are touched and all of it goes with the table:
//!
//! ```text
//! table ip weft {
//!     chain masquerade {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr <pods> ip daddr != <pods> ip daddr != <exception> masquerade fully-random
//!     }
//! }
//! ```

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Expressions, Hook, HookNumber, InetHookNumber, NfTablesMessage, Operator,
    RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};

use crate::nft::{self, Change, FAMILIES, Family, Field};
use crate::{Class, Error};

const TABLE: &str = "weft";
const CHAIN: &str = "masquerade";

/// `NF_IP_PRI_NAT_SRC`: behind the decisions of filters.
const PRIORITY: u32 = 100;

/// `NFTA_MASQ_FLAGS`.
const FLAGS: u16 = 1;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`: two flows that race for the same port don't lose each other's packets.
const FULLY_RANDOM: u32 = 1 << 4;

/// Puts the rules for the pods' ranges in place of whatever the tables held: what goes from one of them to none of them, and
/// to none of the exceptions, is masqueraded. A family without a range has no table. All or nothing, and no packet sees it
/// half done.
///
/// # Errors
/// If the kernel refuses (no nftables, not root).
pub fn ensure(pods: &[IpNetwork], exceptions: &[IpNetwork]) -> Result<(), Error> {
    let changes: Vec<Change> =
        FAMILIES.into_iter().flat_map(|family| family_changes(family, pods, exceptions)).collect();
    nft::batch("put the masquerade rules", &changes)
}

/// Removes the tables. One that is gone is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove() -> Result<(), Error> {
    let removed = FAMILIES.map(|family| {
        let change = (family, NfTablesMessage::DeleteTable(table()), 0);
        match nft::batch("remove the masquerade rules", &[change]) {
            Err(error) if error.class() == Class::NotFound => Ok(()),
            other => other,
        }
    });
    removed.into_iter().collect()
}

fn table() -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] }
}

fn family_changes(family: Family, pods: &[IpNetwork], exceptions: &[IpNetwork]) -> Vec<Change> {
    let within = |networks: &[IpNetwork]| -> Vec<IpNetwork> {
        networks.iter().copied().filter(|network| Family::of(network) == family).collect()
    };
    let (pods, exceptions) = (within(pods), within(exceptions));
    // The table is made before it is deleted, so that the deletion can't miss.
    let mut changes = vec![
        (family, NfTablesMessage::NewTable(table()), NLM_F_CREATE),
        (family, NfTablesMessage::DeleteTable(table()), 0),
    ];
    if pods.is_empty() {
        return changes;
    }
    changes.push((family, NfTablesMessage::NewTable(table()), NLM_F_CREATE));
    changes.push((family, NfTablesMessage::NewChain(chain()), NLM_F_CREATE));
    let rules = pods.iter().map(|from| rule(*from, pods.iter().chain(&exceptions)));
    changes.extend(rules.map(|rule| (family, NfTablesMessage::NewRule(rule), NLM_F_CREATE | NLM_F_APPEND)));
    changes
}

fn chain() -> ChainMessage {
    ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.to_owned()),
            ChainAttribute::Name(CHAIN.to_owned()),
            ChainAttribute::Type("nat".to_owned()),
            ChainAttribute::Hook(vec![
                Hook::Number(HookNumber::Inet(InetHookNumber::PostRouting)),
                Hook::Priority(PRIORITY),
            ]),
        ],
    }
}

fn rule<'a>(from: IpNetwork, not_to: impl Iterator<Item = &'a IpNetwork>) -> RuleMessage {
    let mut expressions: Vec<Expressions> = nft::address(Field::Source, Operator::Equal, from).into();
    expressions.extend(not_to.flat_map(|to| nft::address(Field::Destination, Operator::NotEqual, *to)));
    expressions.push(nft::expression("masq", vec![nft::number(FLAGS, FULLY_RANDOM)]));
    RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(CHAIN.to_owned()),
            RuleAttribute::Expressions(expressions.into_iter().map(Into::into).collect()),
        ],
    }
}
