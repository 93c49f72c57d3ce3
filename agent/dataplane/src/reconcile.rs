//! Keeps the maps at what the tables say: which Services are dirty, applying plans, retrying what failed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use weft_ebpf_abi::{Address, BACKEND_ACTIVE, BackendKey, SCOPE_EXTERNAL, ServiceKey, SlotKey, TCP};
use zerocopy::{FromBytes, IntoBytes};

use crate::desired::desired;
use crate::maps::{Entry, MapError, MapSet, Table};
use crate::plan::{Ledger, Op, Planner};
use crate::tables::{ServiceName, Tables};

/// Failures of one batch after which the rest of it waits for the retry: a full map would otherwise cost a system call per entry.
const MAX_FAILURES_PER_BATCH: usize = 16;

/// What a synchronisation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Operations that succeeded.
    pub applied: usize,
    /// Operations that failed, or waited for one that did.
    pub failed: usize,
}

/// The tables, the maps, and what is between them.
#[derive(Debug)]
pub struct Reconciler<M> {
    /// What the API says.
    pub tables: Tables,
    /// The maps.
    pub maps: M,
    planner: Planner,
    dirty: BTreeSet<ServiceName>,
    node_addresses: BTreeSet<Address>,
    prune: bool,
}

impl<M: MapSet> Reconciler<M> {
    /// Adopts the maps as they are. `tables` are empty yet.
    pub fn adopt(tables: Tables, mut maps: M) -> Result<Self, MapError> {
        let ledger = read_ledger(&mut maps)?;
        let node_addresses = ledger.node_addresses.clone();
        let planner = Planner::adopt(ledger);
        Ok(Self { tables, maps, planner, dirty: BTreeSet::new(), node_addresses, prune: false })
    }

    /// Marks Services as changed.
    pub fn mark(&mut self, names: impl IntoIterator<Item = ServiceName>) {
        self.dirty.extend(names);
    }

    /// All sources are known: the next synchronisation also removes what nobody wants.
    pub fn sources_are_known(&mut self) {
        self.prune = true;
    }

    /// Sets the addresses at which the node answers NodePorts.
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<Address>) {
        self.node_addresses = addresses;
    }

    /// Whether the maps lag behind the tables.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.prune || !self.dirty.is_empty() || self.node_addresses != self.planner.ledger.node_addresses
    }

    /// Number of Services known.
    #[must_use]
    pub fn services(&self) -> usize {
        self.planner.services()
    }

    /// Brings the maps to what the tables say. What fails stays dirty.
    pub fn sync(&mut self) -> Report {
        let mut report = Report::default();
        let changes: Vec<_> = std::mem::take(&mut self.dirty)
            .into_iter()
            .map(|name| {
                let wanted = self.tables.get(&name).map(|(service, slices)| desired(service, &slices));
                (name, wanted)
            })
            .collect();
        let ops = self.planner.plan(&changes);
        let failed = self.apply(ops, &mut report);
        // Planned once more, a Service whose removal succeeded is forgotten.
        let settled = (0..changes.len()).filter(|i| !failed.contains(i) && changes[*i].1.is_none());
        let settled: Vec<_> = settled.map(|i| changes[i].clone()).collect();
        self.planner.plan(&settled);
        self.dirty.extend(failed.into_iter().filter_map(|i| changes.get(i)).map(|(name, _)| name.clone()));

        let addresses = self.planner.plan_node_addresses(&self.node_addresses);
        self.apply(addresses.into_iter().map(|op| (0, op)).collect(), &mut report);
        if self.prune && self.dirty.is_empty() {
            let ops = self.planner.plan_prune();
            let failed = self.apply(ops.into_iter().map(|op| (0, op)).collect(), &mut report);
            self.prune = !failed.is_empty();
        }
        report
    }

    /// Applies operations phase by phase; an owner of one that failed gets no later phase. Returns those owners.
    fn apply(&mut self, ops: Vec<(usize, Op)>, report: &mut Report) -> HashSet<usize> {
        let mut failed = HashSet::new();
        let mut phases: BTreeMap<usize, Vec<(usize, Op)>> = BTreeMap::new();
        for (owner, op) in ops {
            phases.entry(op.phase()).or_default().push((owner, op));
        }
        let mut held = HashSet::new();
        for (_, mut batch) in phases {
            let before = batch.len();
            let blocked = blocked_backends(&batch, &failed);
            batch.retain(|(owner, op)| {
                let wait =
                    failed.contains(owner) || matches!(op, Op::DeleteBackend(key) if blocked.contains(key));
                if wait {
                    held.insert(*owner);
                }
                !wait
            });
            report.failed += before - batch.len();
            self.apply_batch(&batch, report, &mut failed);
        }
        failed.extend(held);
        failed
    }

    fn apply_batch(&mut self, batch: &[(usize, Op)], report: &mut Report, failed: &mut HashSet<usize>) {
        let mut from = 0;
        let mut failures = 0;
        while from < batch.len() && failures < MAX_FAILURES_PER_BATCH {
            let rest = &batch[from..];
            let result = run(&mut self.maps, rest);
            let done = result.as_ref().map_or_else(|error| error.done.min(rest.len()), |()| rest.len());
            for (_, op) in &rest[..done] {
                self.planner.record(op);
            }
            report.applied += done;
            from += done;
            if let Err(error) = result {
                tracing::warn!(error = %error, source = %error.source, "map operation failed, will be retried");
                failures += 1;
                report.failed += 1;
                failed.extend(batch.get(from).map(|(owner, _)| *owner));
                from += 1;
            }
        }
        report.failed += batch.len().saturating_sub(from);
        failed.extend(batch[from.min(batch.len())..].iter().map(|(owner, _)| *owner));
    }

    /// What the maps say, as text in a fixed order, without generations.
    pub fn render(&mut self) -> Result<String, MapError> {
        Ok(render(&read_ledger(&mut self.maps)?))
    }

    /// What is believed to be in the maps, for tests of the belief itself.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.planner.ledger
    }
}

/// Backends that several Services let go of, of which one could not: its lists may still lead there.
fn blocked_backends(batch: &[(usize, Op)], failed: &HashSet<usize>) -> HashSet<BackendKey> {
    let of_failed = batch.iter().filter(|(owner, _)| failed.contains(owner));
    of_failed.filter_map(|(_, op)| if let Op::DeleteBackend(key) = op { Some(*key) } else { None }).collect()
}

/// Runs operations of one phase, which all concern one map in one way.
fn run(maps: &mut impl MapSet, batch: &[(usize, Op)]) -> Result<(), MapError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut keys: Vec<Vec<u8>> = Vec::new();
    let mut table = Table::Services;
    for (_, op) in batch {
        let (t, key, value) = encode(op);
        table = t;
        match value {
            Some(value) => entries.push((key, value)),
            None => keys.push(key),
        }
    }
    if keys.is_empty() { maps.update(table, &entries) } else { maps.delete(table, &keys) }
}

fn encode(op: &Op) -> (Table, Vec<u8>, Option<Vec<u8>>) {
    fn bytes(value: &(impl IntoBytes + zerocopy::Immutable)) -> Vec<u8> {
        value.as_bytes().to_vec()
    }
    match op {
        Op::PutBackend(key, value) => (Table::Backends, bytes(key), Some(bytes(value))),
        Op::PutNodeAddress(key) => (Table::NodeAddresses, bytes(key), Some(bytes(&1_u32))),
        Op::PutSlot(key, value) => (Table::Slots, bytes(key), Some(bytes(value))),
        Op::PutService(key, value) => (Table::Services, bytes(key), Some(bytes(value))),
        Op::DeleteService(key) => (Table::Services, bytes(key), None),
        Op::DeleteSlot(key) => (Table::Slots, bytes(key), None),
        Op::DeleteNodeAddress(key) => (Table::NodeAddresses, bytes(key), None),
        Op::DeleteBackend(key) => (Table::Backends, bytes(key), None),
    }
}

/// Reads all maps.
fn read_ledger(maps: &mut impl MapSet) -> Result<Ledger, MapError> {
    let mut ledger = Ledger::default();
    for table in Table::ALL {
        for (key, value) in maps.dump(table)? {
            if let Some(op) = decode(table, &key, &value) {
                ledger.record(&op);
            }
        }
    }
    Ok(ledger)
}

/// `None` for an entry of another size, which the loader's check of the layout rules out.
fn decode(table: Table, key: &[u8], value: &[u8]) -> Option<Op> {
    fn read<T: FromBytes>(bytes: &[u8]) -> Option<T> {
        T::read_from_bytes(bytes).ok()
    }
    Some(match table {
        Table::Services => Op::PutService(read(key)?, read(value)?),
        Table::Slots => Op::PutSlot(read(key)?, read(value)?),
        Table::Backends => Op::PutBackend(read(key)?, read(value)?),
        Table::NodeAddresses => Op::PutNodeAddress(read(key)?),
    })
}

fn protocol(number: u8) -> &'static str {
    if number == TCP { "TCP" } else { "UDP" }
}

fn backend_text(key: &BackendKey) -> String {
    format!("{}:{}/{}", IpAddr::from(key.address), key.port.get(), protocol(key.protocol))
}

fn service_text(key: &ServiceKey) -> String {
    let address = if key.address == Address::ANY_V4 {
        "node".to_owned()
    } else {
        IpAddr::from(key.address).to_string()
    };
    let scope = if key.scope == SCOPE_EXTERNAL { " from outside" } else { "" };
    if key.protocol == 0 {
        return format!("{address} otherwise refused");
    }
    format!("{address}:{}/{}{scope}", key.port.get(), protocol(key.protocol))
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
        let keep = if value.flags & weft_ebpf_abi::SERVICE_KEEP_SOURCE != 0 { " keeps source" } else { "" };
        let _ = writeln!(out, "service {} list {list} of {}{affinity}{keep}", service_text(key), value.count);
    }
    let mut lists: Vec<String> = Vec::new();
    for (number, slots) in &ledger.lists {
        let next = numbers.len() + 1;
        let list = *numbers.entry(*number).or_insert(next);
        let mut members: Vec<_> = slots.values().map(backend_text).collect();
        members.sort();
        let dense = slots.keys().copied().eq(0..u32::try_from(slots.len()).unwrap_or(u32::MAX));
        let hole = if dense { "" } else { " WITH HOLES" };
        lists.push(format!("list {list}{hole}: {}", members.join(" ")));
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
            match ledger.lists.get(&slot.list).and_then(|l| l.get(&index)) {
                None => found.push(format!("{} misses {slot:?}", service_text(key))),
                Some(backend) if !ledger.backends.contains_key(backend) => {
                    found.push(format!(
                        "{} leads to {} which is gone",
                        service_text(key),
                        backend_text(backend)
                    ));
                }
                Some(_) => {}
            }
        }
    }
    found
}
