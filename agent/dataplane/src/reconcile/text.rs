//! A ledger as text, for tests and for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use weft_ebpf_abi::{
    Address, BACKEND_ACTIVE, BackendKey, SCOPE_EXTERNAL, SCTP, SERVICE_CHECK_SOURCE, SERVICE_DROP_EMPTY,
    SERVICE_HASHED, SERVICE_KEEP_SOURCE, SERVICE_WATCHED, ServiceKey, SlotKey, SourceKey, TCP, UDP,
};

use crate::plan::Ledger;

fn protocol(number: u8) -> &'static str {
    match number {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        _ => "?",
    }
}

fn at(address: Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn backend_text(key: &BackendKey) -> String {
    format!("{}/{}", at(key.address, key.port.get()), protocol(key.protocol))
}

fn service_text(key: &ServiceKey) -> String {
    let scope = if key.scope == SCOPE_EXTERNAL { " from outside" } else { "" };
    if key.protocol == 0 {
        return format!("{} otherwise refused", IpAddr::from(key.address));
    }
    let at = match key.address {
        Address::ANY_V4 => format!("node:{}", key.port.get()),
        Address::ANY => format!("[node]:{}", key.port.get()),
        address => at(address, key.port.get()).to_string(),
    };
    format!("{at}/{}{scope}", protocol(key.protocol))
}

fn flags_text(flags: u32) -> String {
    let names = [
        (SERVICE_HASHED, " hashed"),
        (SERVICE_KEEP_SOURCE, " keeps source"),
        (SERVICE_CHECK_SOURCE, " checks source"),
        (SERVICE_DROP_EMPTY, " drops"),
        (SERVICE_WATCHED, " watched"),
    ];
    names.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name).collect()
}

fn range_text(key: &SourceKey) -> String {
    let bits = key.prefix_bits.saturating_sub(u32::BITS);
    let bits = if key.data.address.as_v4().is_some() { bits.saturating_sub(96) } else { bits };
    format!("{}/{bits}", IpAddr::from(key.data.address))
}

/// A ledger as text. Lists are numbered as they appear, so two ledgers that differ in numbers only are the same text.
#[must_use]
pub fn render(ledger: &Ledger) -> String {
    let mut out = String::new();
    let mut numbers: BTreeMap<u32, usize> = BTreeMap::new();
    for (key, value) in &ledger.services {
        if key.protocol == 0 {
            let _ = writeln!(out, "service {}", service_text(key));
            continue;
        }
        let next = numbers.len() + 1;
        let list = numbers.entry(value.list).or_insert(next);
        let affinity = match value.affinity_seconds {
            0 => String::new(),
            seconds => format!(" affinity {seconds}s"),
        };
        let flags = flags_text(value.flags);
        let _ =
            writeln!(out, "service {} list {list} of {}{affinity}{flags}", service_text(key), value.count);
    }
    let mut lists: Vec<String> = Vec::new();
    for (number, slots) in &ledger.lists {
        let next = numbers.len() + 1;
        let list = *numbers.entry(*number).or_insert(next);
        let mut members: Vec<_> = slots.iter().flatten().map(backend_text).collect();
        members.sort();
        members.dedup();
        let hole = if slots.iter().all(Option::is_some) { "" } else { " WITH HOLES" };
        lists.push(format!("list {list}{hole}: {}", members.join(" ")));
    }
    for (number, ranges) in &ledger.sources {
        let next = numbers.len() + 1;
        let list = *numbers.entry(*number).or_insert(next);
        let ranges: Vec<_> = ranges.iter().map(range_text).collect();
        lists.push(format!("list {list} for {}", ranges.join(" ")));
    }
    lists.sort();
    for line in lists {
        let _ = writeln!(out, "{line}");
    }
    for (key, value) in &ledger.backends {
        let state = if value.flags & BACKEND_ACTIVE != 0 { "active" } else { "draining" };
        let _ = writeln!(out, "backend {} {state}", backend_text(key));
    }
    for address in &ledger.node_addresses {
        let _ = writeln!(out, "node {}", IpAddr::from(*address));
    }
    if out.is_empty() { "maps empty\n".to_owned() } else { out }
}

/// A place that no Service's count reaches, or a service whose list lacks a place: what no reader may ever meet. For tests.
#[must_use]
pub fn dangling(ledger: &Ledger) -> Vec<String> {
    let mut found = Vec::new();
    for (key, value) in &ledger.services {
        for index in 0..value.count {
            let slot = SlotKey { list: value.list, index };
            let list = ledger.lists.get(&slot.list).map_or(&[][..], Vec::as_slice);
            match list.get(index as usize).copied().flatten() {
                None => found.push(format!("{} misses {slot:?}", service_text(key))),
                Some(backend) if !ledger.backends.contains_key(&backend) => {
                    found.push(format!(
                        "{} leads to {} which is gone",
                        service_text(key),
                        backend_text(&backend)
                    ));
                }
                Some(_) => {}
            }
        }
    }
    found
}
