//! Owns which resources are stored, under which keys, and by which kinds they are served.

use std::collections::HashMap;
use std::sync::Arc;
use weft_control_api::kinds::{self, Kind};

use crate::cache::PREFIX;

/// One stored resource: all served versions of one kind share it.
pub(crate) struct Resource {
    /// Its place in the cache.
    pub(crate) id: usize,
    /// The kind that is stored.
    pub(crate) storage: &'static Kind,
    /// What its keys begin with, after the common prefix; ends in a slash.
    pub(crate) prefix: String,
}

/// All stored resources.
pub(crate) struct Resources {
    all: Vec<Arc<Resource>>,
    by_name: HashMap<&'static str, HashMap<&'static str, Arc<Resource>>>,
    by_prefix: HashMap<String, Arc<Resource>>,
}

/// Whether objects of the kind are kept, rather than only answered (reviews, bindings).
fn is_stored(kind: &Kind) -> bool {
    kind.has_verb("get") && kind.has_verb("watch")
}

/// The kind that all served versions of `kind` are stored as.
fn storage_kind(kind: &'static Kind) -> &'static Kind {
    kinds::served()
        .find(|k| k.storage_version && k.group == kind.group && k.plural == kind.plural)
        .unwrap_or(kind)
}

impl Default for Resources {
    fn default() -> Self {
        Self::new()
    }
}

impl Resources {
    /// All resources that the API's kinds name.
    pub(crate) fn new() -> Self {
        let mut this = Self { all: Vec::new(), by_name: HashMap::new(), by_prefix: HashMap::new() };
        for kind in kinds::served().filter(|kind| is_stored(kind)) {
            if this.by_plural(kind.group, kind.plural).is_some() || kind.group == "events.k8s.io" {
                continue;
            }
            let kind = storage_kind(kind);
            let prefix = if kind.group.is_empty() {
                format!("{}/", kind.plural)
            } else {
                format!("{}/{}/", kind.group, kind.plural)
            };
            let resource = Arc::new(Resource { id: this.all.len(), storage: kind, prefix: prefix.clone() });
            this.by_prefix.insert(prefix, resource.clone());
            this.by_name.entry(kind.group).or_default().insert(kind.plural, resource.clone());
            this.all.push(resource);
        }
        // Events of both groups are the same objects.
        if let Some(events) = this.by_plural("", "events").cloned() {
            this.by_name.entry("events.k8s.io").or_default().insert("events", events);
        }
        this
    }

    /// All resources; the index is the id.
    pub(crate) fn all(&self) -> &[Arc<Resource>] {
        &self.all
    }

    /// The resource of a group and plural.
    pub(crate) fn by_plural(&self, group: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.by_name.get(group)?.get(plural)
    }

    /// The resource and the key within it of a key in the store.
    pub(crate) fn by_store_key<'a>(&self, key: &'a str) -> Option<(&Arc<Resource>, &'a str)> {
        let rest = key.strip_prefix(PREFIX)?;
        let first = rest.find('/')? + 1;
        if let Some(resource) = self.by_prefix.get(&rest[..first]) {
            return Some((resource, &rest[first..]));
        }
        let second = first + rest[first..].find('/')? + 1;
        self.by_prefix.get(&rest[..second]).map(|resource| (resource, &rest[second..]))
    }
}
