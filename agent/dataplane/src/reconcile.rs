//! Keeps the maps at what the tables say: which Services are dirty, applying plans, retrying what failed.

mod codec;
mod text;

pub use text::{dangling, render};

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use weft_ebpf_abi::{Address, BackendKey};

use self::codec::{read, run};
use crate::announce::answers::Answers;
use crate::desired::{Desired, Health, desired};
use crate::maps::{MapError, MapSet, Table};
use crate::plan::{Ledger, Op, Planner, Totals};
use crate::tables::{ServiceName, Tables};

/// Failures of one batch after which the rest of it waits for the retry: a full map would otherwise cost a system call per entry.
const MAX_FAILURES_PER_BATCH: usize = 16;

/// Services that are told of at once: more have one cause, and the metric counts them all.
const MAX_TROUBLES: usize = 64;
/// Rounds of one synchronisation: an address that changes hands takes two, and a round costs only what changed. The rest
/// waits for the next synchronisation.
const MAX_ROUNDS: usize = 4;

/// Rounds in which failures of a Service are taken for a passing trouble.
const ROUNDS_WAITED_FOR: u32 = 3;

/// Why a Service is not in the maps as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unprogrammed {
    /// Since when.
    pub since: Instant,
    /// Synchronisations since then that left it so.
    pub rounds: u32,
    /// Those of them in which an operation of its own failed; in the others it had to wait.
    pub failures: u32,
    /// What failed last.
    pub reason: String,
}

/// Why operations of a Service were not done.
#[derive(Debug)]
struct Failure {
    reason: String,
    /// One was tried and failed; else they wait for others'.
    tried: bool,
}

/// What a synchronisation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Operations that succeeded.
    pub applied: usize,
    /// Everything was compared with what Services want.
    pub full: bool,
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
    unprogrammed: BTreeMap<ServiceName, Unprogrammed>,
    /// Services that go on failing, to be told of.
    troubles: Vec<(ServiceName, String)>,
    health: HashMap<ServiceName, Health>,
    answers: Answers,
    health_changes: BTreeSet<ServiceName>,
    watched: HashMap<ServiceName, BTreeMap<BackendKey, u64>>,
    watched_changed: bool,
    left: BTreeSet<BackendKey>,
    node_addresses: BTreeSet<Address>,
    prune: Prune,
}

/// What is still to be removed because no Service wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prune {
    Nothing,
    /// Backends: a Service that failed may still lead to one.
    Backends,
    All,
}

impl<M: MapSet> Reconciler<M> {
    /// Adopts the maps as they are. `tables` are empty yet.
    pub fn adopt(tables: Tables, mut maps: M) -> Result<Self, MapError> {
        let planner = Planner::adopt(read(&mut maps)?);
        let node_addresses = planner.node_addresses().clone();
        Ok(Self {
            tables,
            maps,
            planner,
            dirty: BTreeSet::new(),
            unprogrammed: BTreeMap::new(),
            troubles: Vec::new(),
            health: HashMap::new(),
            answers: Answers::default(),
            health_changes: BTreeSet::new(),
            watched: HashMap::new(),
            // What an earlier agent left is to be compared, too.
            watched_changed: true,
            left: BTreeSet::new(),
            node_addresses,
            prune: Prune::Nothing,
        })
    }

    /// Marks Services as changed.
    pub fn mark(&mut self, names: impl IntoIterator<Item = ServiceName>) {
        self.dirty.extend(names);
    }

    /// All sources are known: the next synchronisation also removes what nobody wants.
    pub fn sources_are_known(&mut self) {
        self.prune = Prune::All;
    }

    /// Sets the addresses at which the node answers NodePorts.
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<Address>) {
        self.node_addresses = addresses;
    }

    /// Whether the maps lag behind the tables.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.prune != Prune::Nothing
            || !self.dirty.is_empty()
            || !self.unprogrammed.is_empty()
            || self.node_addresses != *self.planner.node_addresses()
    }

    /// Whether everything is in the maps but for Services that failed again and again: those are shown, and retried, but need
    /// not be waited for.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.prune != Prune::All
            && self.dirty.is_empty()
            && self.unprogrammed.values().all(|state| state.rounds >= ROUNDS_WAITED_FOR)
            && self.node_addresses == *self.planner.node_addresses()
    }

    /// Whose a list is.
    #[must_use]
    pub fn owner_of_list(&self, number: u32) -> Option<&ServiceName> {
        self.planner.owner_of_list(number)
    }

    /// Counts over all Services.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.planner.totals()
    }

    /// Services that are not in the maps as they should be, and why.
    #[must_use]
    pub fn unprogrammed(&self) -> &BTreeMap<ServiceName, Unprogrammed> {
        &self.unprogrammed
    }

    /// Services that have begun to fail again and again, and why.
    pub fn take_troubles(&mut self) -> Vec<(ServiceName, String)> {
        std::mem::take(&mut self.troubles)
    }

    /// What load balancers are to be told anew, by Service; `None` for nothing any more.
    pub fn take_health_changes(&mut self) -> Vec<(ServiceName, Option<Health>)> {
        let changed = std::mem::take(&mut self.health_changes);
        changed.into_iter().map(|name| (name.clone(), self.health.get(&name).copied())).collect()
    }

    /// The backends whose connections are to be watched, with their owners, if that has changed since the last call.
    pub fn take_watched(&mut self) -> Option<BTreeMap<BackendKey, u64>> {
        if !std::mem::take(&mut self.watched_changed) {
            return None;
        }
        let mut all = BTreeMap::new();
        for (key, owner) in self.watched.values().flatten() {
            // Two Services may name another owner: always the same one counts.
            let known = all.entry(*key).or_insert(*owner);
            *known = (*known).max(*owner);
        }
        Some(all)
    }

    /// The Services that have a backend's connections watched.
    #[must_use]
    pub fn watchers(&self, backend: &BackendKey) -> Vec<ServiceName> {
        let with = self.watched.iter().filter(|(_, backends)| backends.contains_key(backend));
        with.map(|(name, _)| name.clone()).collect()
    }

    /// UDP backends that sockets must leave since the last call.
    pub fn take_left(&mut self) -> BTreeSet<BackendKey> {
        std::mem::take(&mut self.left)
    }

    /// Entries of a map, as far as known.
    #[must_use]
    pub fn entries(&self, table: Table) -> usize {
        self.planner.entries(table)
    }

    /// The load-balancer addresses to answer for, if they have changed since the last call.
    pub fn take_answers(&mut self) -> Option<BTreeSet<IpAddr>> {
        self.answers.take()
    }

    /// Brings the maps to what the tables say: Services that changed or, if none did, those that failed before.
    pub fn sync(&mut self) -> Report {
        let mut report = Report { full: self.prune == Prune::All, ..Report::default() };
        if self.dirty.is_empty() {
            self.dirty.extend(self.unprogrammed.keys().cloned());
        }
        for _ in 0..MAX_ROUNDS {
            self.sync_services(&mut report);
            self.dirty.extend(self.planner.take_disturbed());
            if self.dirty.is_empty() {
                break;
            }
        }
        let addresses = self.planner.plan_node_addresses(&self.node_addresses);
        self.apply(addresses.into_iter().map(|op| (0, op)).collect(), &mut report);
        self.prune(&mut report);
        report
    }

    /// A Service that fails keeps nothing else from being pruned: all have been planned, so what they want is known.
    fn prune(&mut self, report: &mut Report) {
        let settled = self.dirty.is_empty() && self.unprogrammed.is_empty();
        let mut remove = |this: &mut Self, ops: Vec<Op>| {
            this.apply(ops.into_iter().map(|op| (0, op)).collect(), report).is_empty()
        };
        if self.prune == Prune::All {
            let ops = self.planner.plan_prune();
            if remove(self, ops) {
                self.prune = Prune::Backends;
            }
        }
        if self.prune == Prune::Backends && settled {
            let ops = self.planner.plan_prune_backends();
            if remove(self, ops) {
                self.prune = Prune::Nothing;
            }
        }
    }

    /// One round over the Services that are dirty.
    fn sync_services(&mut self, report: &mut Report) {
        // Those that failed before come last, and most often last of all: after some failures a batch is given up, and
        // each must have its turn.
        let dirty = std::mem::take(&mut self.dirty);
        let (mut again, new): (Vec<_>, Vec<_>) =
            dirty.into_iter().partition(|name| self.unprogrammed.contains_key(name));
        again.sort_by_key(|name| self.unprogrammed.get(name).map_or(0, |state| state.failures));
        let mut changes = Vec::with_capacity(new.len() + again.len());
        let mut gone = Vec::new();
        for name in new.into_iter().chain(again) {
            let wanted = self.tables.get(&name);
            gone.push(wanted.is_none());
            let wanted = wanted.map(|(service, slices)| desired(service, &slices, self.tables.view()));
            let wanted = wanted.unwrap_or_default();
            self.note_health(&name, wanted.health);
            self.note_watched(&name, &wanted.watched);
            self.answers.note(&name, &wanted.answers);
            changes.push((name, wanted));
        }
        let names: Vec<_> = changes.iter().map(|(name, _)| name.clone()).collect();
        let ops = self.planner.plan(changes);
        let failed = self.apply(ops, report);
        // Planned once more, a Service whose removal succeeded is forgotten.
        let settled = (0..names.len()).filter(|i| gone[*i] && !failed.contains_key(i));
        let settled: Vec<_> = settled.map(|i| (names[i].clone(), Desired::default())).collect();
        self.planner.plan(settled);
        self.note_failures(&names, failed);
    }

    fn note_health(&mut self, name: &ServiceName, health: Option<Health>) {
        let before = match health {
            Some(health) => self.health.insert(name.clone(), health),
            None => self.health.remove(name),
        };
        if before != health {
            self.health_changes.insert(name.clone());
        }
    }

    fn note_watched(&mut self, name: &ServiceName, wanted: &BTreeMap<BackendKey, u64>) {
        let nothing = BTreeMap::new();
        if self.watched.get(name).unwrap_or(&nothing) == wanted {
            return;
        }
        self.watched_changed = true;
        if wanted.is_empty() {
            self.watched.remove(name);
        } else {
            self.watched.insert(name.clone(), wanted.clone());
        }
    }

    fn note_failures(&mut self, names: &[ServiceName], mut failed: HashMap<usize, Failure>) {
        for (index, name) in names.iter().enumerate() {
            let Some(failure) = failed.remove(&index) else {
                self.unprogrammed.remove(name);
                continue;
            };
            let state = self.unprogrammed.entry(name.clone()).or_insert_with(|| Unprogrammed {
                since: Instant::now(),
                rounds: 0,
                failures: 0,
                reason: String::new(),
            });
            state.rounds = state.rounds.saturating_add(1);
            if failure.tried {
                state.failures = state.failures.saturating_add(1);
            }
            state.reason = failure.reason;
            if state.rounds == ROUNDS_WAITED_FOR && self.troubles.len() < MAX_TROUBLES {
                self.troubles.push((name.clone(), state.reason.clone()));
            }
        }
    }

    /// Applies operations phase by phase; an owner of one that failed gets no later phase. Returns those owners, and why.
    fn apply(&mut self, mut ops: Vec<(usize, Op)>, report: &mut Report) -> HashMap<usize, Failure> {
        let mut failed = HashMap::new();
        let mut held = HashSet::new();
        ops.sort_by_key(|(_, op)| op.phase());
        for batch in ops.chunk_by(|(_, one), (_, next)| one.phase() == next.phase()) {
            if failed.is_empty() {
                self.apply_batch(batch, report, &mut failed);
                continue;
            }
            let blocked = blocked_backends(batch, &failed);
            let (waiting, ready): (Vec<_>, Vec<_>) = batch.iter().copied().partition(|(owner, op)| {
                failed.contains_key(owner) || matches!(op, Op::DeleteBackend(key) if blocked.contains(key))
            });
            held.extend(waiting.iter().map(|(owner, _)| *owner));
            report.failed += waiting.len();
            self.apply_batch(&ready, report, &mut failed);
        }
        for owner in held {
            let reason = || "waits for another service of the same backend".to_owned();
            failed.entry(owner).or_insert_with(|| Failure { reason: reason(), tried: false });
        }
        failed
    }

    fn apply_batch(
        &mut self,
        batch: &[(usize, Op)],
        report: &mut Report,
        failed: &mut HashMap<usize, Failure>,
    ) {
        let mut from = 0;
        let mut failures = 0;
        let mut reason = String::new();
        while from < batch.len() && failures < MAX_FAILURES_PER_BATCH {
            let rest = &batch[from..];
            let result = run(&mut self.maps, rest);
            let done = result.as_ref().map_or_else(|error| error.done.min(rest.len()), |()| rest.len());
            for (_, op) in &rest[..done] {
                self.left.extend(self.planner.book().left_by(op));
                self.planner.record(op);
            }
            report.applied += done;
            from += done;
            if let Err(error) = result {
                reason = error.reason();
                tracing::debug!(reason, "map operation failed, will be retried");
                failures += 1;
                report.failed += 1;
                if let Some((owner, _)) = batch.get(from) {
                    let failure = failed.entry(*owner);
                    failure.or_insert_with(|| Failure { reason: reason.clone(), tried: true });
                }
                from += 1;
            }
        }
        report.failed += batch.len().saturating_sub(from);
        for (owner, _) in &batch[from.min(batch.len())..] {
            failed.entry(*owner).or_insert_with(|| Failure { reason: reason.clone(), tried: false });
        }
    }

    /// What the maps say, as text in a fixed order, without generations.
    pub fn render(&mut self) -> Result<String, MapError> {
        Ok(render(&read(&mut self.maps)?.ledger()))
    }

    /// What is believed to be in the maps, for tests of the belief itself.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.planner.book().ledger()
    }
}

/// Backends that several Services let go of, of which one could not: its lists may still lead there.
fn blocked_backends(batch: &[(usize, Op)], failed: &HashMap<usize, Failure>) -> HashSet<BackendKey> {
    let of_failed = batch.iter().filter(|(owner, _)| failed.contains_key(owner));
    of_failed.filter_map(|(_, op)| if let Op::DeleteBackend(key) = op { Some(*key) } else { None }).collect()
}
