//! Owns revisions: which ReplicaSet has the current template, its hash, and the annotations of history.

use super::plan::TEMPLATE_HASH;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::PodTemplateSpec;

pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";
const HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub(super) const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub(super) const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
/// Longest history kept in the annotation, in characters.
const HISTORY_CHARS: usize = 2000;

/// Annotations of the Deployment that its ReplicaSets don't take over.
const OWN: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    HISTORY,
    DESIRED,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

/// Upstream's alphabet for generated names: no vowels, no digits that look like letters.
const SAFE: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// An annotation that holds a number.
pub(super) fn annotation_number(rs: &ReplicaSet, name: &str) -> Option<i64> {
    rs.metadata.annotations.as_ref()?.get(name)?.parse().ok()
}

/// Whether a ReplicaSet was made for the Deployment's current template.
pub(super) fn has_template(rs: &ReplicaSet, d: &Deployment) -> bool {
    let (Some(template), Some(spec)) = (rs.spec.as_ref().and_then(|s| s.template.as_ref()), d.spec.as_ref())
    else {
        return false;
    };
    same_template(template, &spec.template)
}

/// Equal but for the hash label.
pub(crate) fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    without_hash(a) == without_hash(b)
}

fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    let labels = meta.labels.get_or_insert_default();
    labels.remove(TEMPLATE_HASH);
    meta.annotations.get_or_insert_default();
    meta.creation_timestamp = None;
    template
}

/// A stable hash of the template (FNV-1a over its canonical JSON), told apart by the collision count.
pub(super) fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let json = serde_json::to_vec(template).expect("a pod template has string keys only");
    let mut hash: u32 = 0x811c_9dc5;
    let collisions = collisions.map(i32::to_le_bytes);
    for byte in json.iter().chain(collisions.iter().flatten()) {
        hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    }
    let safe = |digit: char| char::from(SAFE[digit as usize % SAFE.len()]);
    hash.to_string().chars().map(safe).collect()
}

/// Sets the annotations of the ReplicaSet with the current template.
pub(super) fn annotate(rs: &mut ReplicaSet, d: &Deployment, revision: i64, exists: bool) {
    let before = annotation_number(rs, REVISION);
    let annotations = rs.metadata.annotations.get_or_insert_default();
    let theirs = d.metadata.annotations.iter().flatten();
    for (key, value) in theirs.filter(|(key, _)| !OWN.contains(&key.as_str())) {
        annotations.insert(key.clone(), value.clone());
    }
    if before.unwrap_or(0) < revision {
        let replaced = annotations.insert(REVISION.into(), revision.to_string());
        if let (true, Some(replaced)) = (exists, replaced) {
            let history = annotations.get(HISTORY).filter(|h| !h.is_empty());
            let mut history = match history {
                Some(history) => format!("{history},{replaced}"),
                None => replaced,
            };
            while history.len() > HISTORY_CHARS {
                let Some((_, rest)) = history.split_once(',') else { break };
                history = rest.to_owned();
            }
            annotations.insert(HISTORY.into(), history);
        }
    }
    if !exists {
        let wanted = super::math::wanted(d);
        annotations.insert(DESIRED.into(), wanted.to_string());
        annotations.insert(MAX_REPLICAS.into(), (wanted + super::math::max_surge(d)).to_string());
    }
}
