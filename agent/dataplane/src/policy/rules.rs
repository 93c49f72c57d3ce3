//! Sets of rules: what the policies of a pod allow it one way, and the entries that this means. Pure.

use std::collections::BTreeSet;

use weft_ebpf_abi::policy::{IDENTITY_NONE, RuleKey};

use super::objects::{Name, NamedPort, Peer, PortRule, Rule, number};

/// Peers (`None` for everybody) with ports.
pub type SetSpec = BTreeSet<(Option<Peer>, PortRule)>;

/// What an address belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// A peer in use.
    Peer(u64),
    /// A port that a rule in use names.
    Port(NamedPort),
}

/// Joins rules to a set. `own` are the ports of the pod that names are resolved by on the way in; on the way out the destination's
/// identity carries its ports.
#[must_use]
pub fn set<'a>(rules: impl IntoIterator<Item = &'a Rule>, own: Option<&BTreeSet<NamedPort>>) -> SetSpec {
    let mut spec = SetSpec::new();
    for rule in rules {
        let peers: Vec<_> = match &rule.peers {
            None => vec![None],
            Some(peers) => peers.iter().cloned().map(Some).collect(),
        };
        for port in ports(rule, own) {
            spec.extend(peers.iter().map(|peer| (peer.clone(), port.clone())));
        }
    }
    spec
}

fn ports(rule: &Rule, own: Option<&BTreeSet<NamedPort>>) -> Vec<PortRule> {
    let Some(ports) = &rule.ports else { return vec![PortRule::Any] };
    let mut all = Vec::with_capacity(ports.len());
    for port in ports {
        match (port, own) {
            (PortRule::Named(protocol, name), Some(own)) => {
                let meant = own.iter().filter(|p| p.protocol == *protocol && p.name == *name);
                all.extend(meant.map(|p| PortRule::Span(*protocol, p.number, p.number)));
            }
            (PortRule::Any | PortRule::Span(..) | PortRule::Named(..), _) => all.push(port.clone()),
        }
    }
    all
}

/// Policies on trial one way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Trial {
    /// For packets into pods; else out of them.
    pub ingress: bool,
    /// The policies.
    pub policies: BTreeSet<Name>,
}

/// A set's number; the empty one has one too. One on trial is its policies' own: its number stands for them in counters.
#[must_use]
pub fn set_number(spec: &SetSpec, trial: Option<&Trial>) -> u64 {
    let rules: Vec<_> = spec.iter().map(|(peer, port)| (peer.as_ref().map(|p| p.id), port)).collect();
    trial.map_or_else(|| number(&rules), |trial| number(&(trial, &rules)))
}

/// Entries for everybody.
#[must_use]
pub fn for_all(set: u64, spec: &SetSpec) -> Vec<RuleKey> {
    let open = spec.iter().filter(|(peer, _)| peer.is_none());
    open.flat_map(|(_, port)| entries(set, IDENTITY_NONE, port, &BTreeSet::new())).collect()
}

/// Entries for one identity.
#[must_use]
pub fn for_identity(set: u64, spec: &SetSpec, identity: u64, elements: &BTreeSet<Element>) -> Vec<RuleKey> {
    let meant = spec.iter().filter(|(peer, port)| match peer {
        Some(peer) => elements.contains(&Element::Peer(peer.id)),
        // Everybody has entries already, but a name is another number for each.
        None => matches!(port, PortRule::Named(..)),
    });
    meant.flat_map(|(_, port)| entries(set, identity, port, elements)).collect()
}

fn entries(set: u64, identity: u64, port: &PortRule, elements: &BTreeSet<Element>) -> Vec<RuleKey> {
    match port {
        PortRule::Any => vec![RuleKey::new(set, identity, None, None)],
        PortRule::Span(protocol, 0, u16::MAX) => vec![RuleKey::new(set, identity, Some(*protocol), None)],
        PortRule::Span(protocol, first, last) => {
            let prefixes = prefixes(*first, *last).into_iter();
            prefixes.map(|prefix| RuleKey::new(set, identity, Some(*protocol), Some(prefix))).collect()
        }
        PortRule::Named(protocol, name) => {
            let numbers = elements.iter().filter_map(|element| match element {
                Element::Port(port) if port.protocol == *protocol && port.name == *name => Some(port.number),
                Element::Port(_) | Element::Peer(_) => None,
            });
            numbers.map(|port| RuleKey::new(set, identity, Some(*protocol), Some((port, 16)))).collect()
        }
    }
}

/// The fewest prefixes that cover a range of ports: at most 30.
#[must_use]
pub fn prefixes(first: u16, last: u16) -> Vec<(u16, u32)> {
    let mut all = Vec::new();
    let (mut at, end) = (u32::from(first), u32::from(last));
    while at <= end {
        // As large as its alignment allows, and no larger than what is left.
        let aligned = at.trailing_zeros().min(16);
        let fits = (end - at + 1).ilog2();
        let free = aligned.min(fits);
        if let Ok(port) = u16::try_from(at) {
            all.push((port, 16 - free));
        }
        at += 1 << free;
    }
    all
}
