//! Owns the graph of owners and dependents, fed by metadata of all deletable objects. Pure: it says which objects to
//! look at, it doesn't look.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use std::collections::{BTreeSet, HashMap};

/// Finalizer of an object that waits for its dependents to be deleted.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an object whose dependents are to be kept.
pub(crate) const ORPHAN: &str = "orphan";

/// Which object: enough to ask the API for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Identity {
    pub(crate) group: String,
    pub(crate) kind: String,
    /// Empty for cluster scope. For an owner only known by reference, the namespace of the dependent.
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Task {
    /// May have to be deleted.
    Delete(String),
    /// Its dependents are to be let go.
    Orphan(String),
}

/// An object in the graph.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) identity: Identity,
    pub(crate) owners: Vec<OwnerReference>,
    pub(crate) dependents: BTreeSet<String>,
    pub(crate) deleting: bool,
    /// Deletion waits for the dependents.
    pub(crate) foreground: bool,
    pub(crate) orphaning: bool,
    /// Known by a reference only.
    pub(crate) unseen: bool,
}

/// Objects by uid.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    nodes: HashMap<String, Node>,
}

/// The group of an `apiVersion`.
pub(crate) fn group_of(api_version: &str) -> &str {
    api_version.split_once('/').map_or("", |(group, _)| group)
}

impl Graph {
    pub(crate) fn get(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(uid)
    }

    /// The dependents of an object.
    pub(crate) fn dependents(&self, uid: &str) -> Vec<Node> {
        let uids = self.nodes.get(uid).map(|n| n.dependents.clone()).unwrap_or_default();
        uids.iter().filter_map(|uid| self.nodes.get(uid).cloned()).collect()
    }

    /// The uids of the seen objects of a kind.
    pub(crate) fn of_kind(&self, group: &str, kind: &str) -> Vec<String> {
        let is = |n: &&Node| n.identity.group == group && n.identity.kind == kind && !n.unseen;
        self.nodes.values().filter(is).map(|n| n.identity.uid.clone()).collect()
    }

    /// Takes an object's newest metadata over. Returns what to look at.
    pub(crate) fn apply(&mut self, identity: Identity, meta: &ObjectMeta) -> Vec<Task> {
        let uid = identity.uid.clone();
        let has = |f: &str| meta.finalizers.iter().flatten().any(|x| x == f);
        let deleting = meta.deletion_timestamp.is_some();
        let owners = meta.owner_references.clone().unwrap_or_default();
        let (foreground, orphaning) = (deleting && has(FOREGROUND), deleting && has(ORPHAN));
        let mut tasks = Vec::new();
        let before = self.nodes.get(&uid).cloned();
        let dependents = before.as_ref().map(|n| n.dependents.clone()).unwrap_or_default();
        let seen_before = before.filter(|n| !n.unseen);
        let old_owners = seen_before.as_ref().map(|n| n.owners.clone()).unwrap_or_default();
        tasks.extend(self.relink(&identity, &old_owners, &owners));
        if foreground && !seen_before.as_ref().is_some_and(|n| n.foreground) {
            tasks.extend(dependents.iter().cloned().map(Task::Delete));
            tasks.push(Task::Delete(uid.clone()));
        }
        if orphaning && !seen_before.as_ref().is_some_and(|n| n.orphaning) {
            tasks.push(Task::Orphan(uid.clone()));
        }
        if deleting && !seen_before.as_ref().is_some_and(|n| n.deleting) {
            // A waiting owner no longer has to delete this one itself.
            tasks.extend(self.waiting_owners(&owners));
        }
        let node = Node { identity, owners, dependents, deleting, foreground, orphaning, unseen: false };
        self.nodes.insert(uid, node);
        tasks
    }

    /// Takes the end of an object over. Returns what to look at.
    pub(crate) fn remove(&mut self, uid: &str) -> Vec<Task> {
        let Some(node) = self.nodes.remove(uid) else { return vec![] };
        for owner in &node.owners {
            self.unlink(uid, &owner.uid);
        }
        let mut tasks = self.waiting_owners(&node.owners);
        tasks.extend(node.dependents.iter().cloned().map(Task::Delete));
        tasks
    }

    /// Links a dependent to new owners and unlinks it from old ones.
    fn relink(&mut self, identity: &Identity, old: &[OwnerReference], new: &[OwnerReference]) -> Vec<Task> {
        let mut tasks = Vec::new();
        for owner in new {
            let is_new = !old.iter().any(|o| o.uid == owner.uid);
            let node = self.nodes.entry(owner.uid.clone()).or_insert_with(|| unseen(identity, owner));
            node.dependents.insert(identity.uid.clone());
            // Whether an owner that was never seen exists must be asked; one that is being deleted in the
            // foreground takes newcomers with it.
            if is_new && (node.unseen || node.foreground) {
                tasks.push(Task::Delete(identity.uid.clone()));
            }
        }
        for owner in old {
            let now = new.iter().find(|o| o.uid == owner.uid);
            if now.is_none() {
                self.unlink(&identity.uid, &owner.uid);
                tasks.push(Task::Delete(identity.uid.clone()));
            }
            let blocked = owner.block_owner_deletion == Some(true);
            if blocked && now.is_none_or(|o| o.block_owner_deletion != Some(true)) {
                tasks.extend(self.waiting_owners(std::slice::from_ref(owner)));
            }
        }
        tasks
    }

    fn waiting_owners(&self, owners: &[OwnerReference]) -> Vec<Task> {
        let waiting = |o: &&OwnerReference| self.nodes.get(&o.uid).is_some_and(|n| n.foreground);
        owners.iter().filter(waiting).map(|o| Task::Delete(o.uid.clone())).collect()
    }

    fn unlink(&mut self, dependent: &str, owner: &str) {
        let Some(node) = self.nodes.get_mut(owner) else { return };
        node.dependents.remove(dependent);
        if node.unseen && node.dependents.is_empty() {
            self.nodes.remove(owner);
        }
    }
}

fn unseen(dependent: &Identity, owner: &OwnerReference) -> Node {
    Node {
        identity: Identity {
            group: group_of(&owner.api_version).to_owned(),
            kind: owner.kind.clone(),
            namespace: dependent.namespace.clone(),
            name: owner.name.clone(),
            uid: owner.uid.clone(),
        },
        owners: vec![],
        dependents: BTreeSet::new(),
        deleting: false,
        foreground: false,
        orphaning: false,
        unseen: true,
    }
}

/// What the owners of an object are, as the API says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OwnerState {
    /// There, and stays.
    Solid,
    /// Gone, or another object of the same name.
    Dangling,
    /// There, and waits for its dependents to be deleted.
    Waiting,
}

/// What becomes of an object, given the states of its owners.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Keep,
    /// It has a solid owner: only these references go.
    Drop(Vec<String>),
    /// It is deleted. With dependents of its own that a waiting owner must wait for: in the foreground.
    Delete {
        /// Whether in the foreground.
        foreground: bool,
    },
}

/// Decides about an object; as upstream's `attemptToDeleteItem`.
pub(crate) fn verdict(owners: &[(OwnerReference, OwnerState)], has_dependents: bool) -> Verdict {
    let of = |state: OwnerState| owners.iter().filter(move |(_, s)| *s == state);
    if owners.is_empty() {
        return Verdict::Keep;
    }
    if of(OwnerState::Solid).next().is_some() {
        let gone: Vec<_> =
            of(OwnerState::Dangling).chain(of(OwnerState::Waiting)).map(|(o, _)| o.uid.clone()).collect();
        return if gone.is_empty() { Verdict::Keep } else { Verdict::Drop(gone) };
    }
    let waiting = of(OwnerState::Waiting).next().is_some();
    Verdict::Delete { foreground: waiting && has_dependents }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn identity(uid: &str) -> Identity {
        Identity {
            group: "apps".into(),
            kind: "ReplicaSet".into(),
            namespace: "default".into(),
            name: uid.into(),
            uid: uid.into(),
        }
    }

    fn owner(uid: &str, blocks: bool) -> OwnerReference {
        OwnerReference {
            api_version: "apps/v1".into(),
            kind: "Deployment".into(),
            name: uid.into(),
            uid: uid.into(),
            block_owner_deletion: Some(blocks),
            controller: Some(true),
        }
    }

    fn meta(owners: Vec<OwnerReference>, deleting: bool, finalizers: &[&str]) -> ObjectMeta {
        ObjectMeta {
            owner_references: Some(owners),
            deletion_timestamp: deleting.then_some(Time(jiff::Timestamp::UNIX_EPOCH)),
            finalizers: Some(finalizers.iter().map(|f| (*f).to_owned()).collect()),
            ..ObjectMeta::default()
        }
    }

    fn delete(uid: &str) -> Task {
        Task::Delete(uid.into())
    }

    #[test]
    fn dependents_are_looked_at_when_their_owner_goes() {
        let mut graph = Graph::default();
        graph.apply(identity("owner"), &meta(vec![], false, &[]));
        assert!(graph.apply(identity("child"), &meta(vec![owner("owner", true)], false, &[])).is_empty());
        assert_eq!(graph.remove("owner"), [delete("child")]);
    }

    #[test]
    fn an_owner_never_seen_is_asked_for() {
        let mut graph = Graph::default();
        let tasks = graph.apply(identity("child"), &meta(vec![owner("ghost", true)], false, &[]));
        assert_eq!(tasks, [delete("child")]);
        assert!(graph.get("ghost").unwrap().unseen);
        graph.remove("child");
        assert!(graph.get("ghost").is_none(), "an unseen owner without dependents is forgotten");
    }

    #[test]
    fn a_late_owner_keeps_the_dependents_found_before() {
        let mut graph = Graph::default();
        graph.apply(identity("child"), &meta(vec![owner("owner", true)], false, &[]));
        graph.apply(identity("owner"), &meta(vec![], false, &[]));
        assert_eq!(graph.dependents("owner").len(), 1);
        assert!(!graph.get("owner").unwrap().unseen);
    }

    #[test]
    fn foreground_deletion_goes_through_the_dependents_and_comes_back() {
        let mut graph = Graph::default();
        graph.apply(identity("owner"), &meta(vec![], false, &[]));
        graph.apply(identity("child"), &meta(vec![owner("owner", true)], false, &[]));
        let tasks = graph.apply(identity("owner"), &meta(vec![], true, &[FOREGROUND]));
        assert_eq!(tasks, [delete("child"), delete("owner")]);
        assert_eq!(graph.remove("child"), [delete("owner")]);
    }

    #[test]
    fn orphaning_is_a_task_of_its_own() {
        let mut graph = Graph::default();
        graph.apply(identity("owner"), &meta(vec![], false, &[]));
        let tasks = graph.apply(identity("owner"), &meta(vec![], true, &[ORPHAN]));
        assert_eq!(tasks, [Task::Orphan("owner".into())]);
    }

    #[test]
    fn verdicts_follow_the_owners() {
        use OwnerState::{Dangling, Solid, Waiting};
        let decide = |states: &[OwnerState], dependents| {
            let owners: Vec<_> =
                states.iter().enumerate().map(|(n, s)| (owner(&n.to_string(), true), *s)).collect();
            verdict(&owners, dependents)
        };
        let rows: [(&[OwnerState], bool, Verdict); 8] = [
            (&[], false, Verdict::Keep),
            (&[Solid], false, Verdict::Keep),
            (&[Solid, Dangling], false, Verdict::Drop(vec!["1".into()])),
            (&[Waiting, Solid], true, Verdict::Drop(vec!["0".into()])),
            (&[Dangling], true, Verdict::Delete { foreground: false }),
            (&[Waiting], true, Verdict::Delete { foreground: true }),
            (&[Waiting], false, Verdict::Delete { foreground: false }),
            (&[Waiting, Dangling], true, Verdict::Delete { foreground: true }),
        ];
        for (states, dependents, expected) in rows {
            assert_eq!(decide(states, dependents), expected, "{states:?} {dependents}");
        }
    }
}
