//! What a node writes of its Services into an annotation of its own Lease.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::coordination::v1::Lease;
use weft_control_client::ObjectKey;

/// Annotation on a node's Lease: `{"version":"4711","failing":{"map weft_slot_2 is full":["default/web"]},"more":0}`.
pub(super) const ANNOTATION: &str = "weft.dev/services";

/// All Services are programmed as they were at a resource version, but for those that fail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) version: u64,
    /// Why each fails.
    pub(super) failing: BTreeMap<ObjectKey, Arc<str>>,
    /// More fail than the list names.
    pub(super) is_cut_short: bool,
}

/// The report on a Lease; `None` if there is none, or none that can be read.
pub(super) fn read(lease: &Lease) -> Option<Report> {
    parse(lease.metadata.annotations.as_ref()?.get(ANNOTATION)?)
}

fn parse(text: &str) -> Option<Report> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let mut failing = BTreeMap::new();
    for (reason, names) in value["failing"].as_object().into_iter().flatten() {
        let reason: Arc<str> = reason.as_str().into();
        for name in names.as_array().into_iter().flatten() {
            let (namespace, name) = name.as_str()?.split_once('/')?;
            failing.insert(ObjectKey::new(namespace, name), Arc::clone(&reason));
        }
    }
    let version = value["version"].as_str()?.parse().ok()?;
    Some(Report { version, failing, is_cut_short: value["more"].as_u64().unwrap_or(0) > 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_rubbish_is_none() {
        let report =
            parse(r#"{"version":"7","failing":{"full":["a/b","a/c"],"odd":["x/y"]},"more":2}"#).unwrap();
        assert_eq!((report.version, report.failing.len(), report.is_cut_short), (7, 3, true));
        assert_eq!(&*report.failing[&ObjectKey::new("a", "c")], "full");
        assert_eq!(parse(r#"{"version":"8"}"#).unwrap(), Report { version: 8, ..Report::default() });
        for bad in ["", "{}", "[]", r#"{"version":8}"#, r#"{"version":"8","failing":{"full":["noslash"]}}"#] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
