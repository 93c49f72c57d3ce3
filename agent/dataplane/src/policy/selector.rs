//! Label selectors (`metav1.LabelSelector`).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// What a selector asks of one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Asks {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    /// An operator that the API does not know selects nothing.
    Never,
}

/// Conditions on labels, all of which must hold. Without any it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(Vec<(String, Asks)>);

impl Selector {
    /// Reads one; sorted, so that equal selectors compare equal.
    #[must_use]
    pub fn new(selector: &LabelSelector) -> Self {
        let exact = selector.match_labels.iter().flatten();
        let mut all: Vec<_> =
            exact.map(|(key, value)| (key.clone(), Asks::In(vec![value.clone()]))).collect();
        for one in selector.match_expressions.iter().flatten() {
            let mut values = one.values.clone().unwrap_or_default();
            values.sort_unstable();
            values.dedup();
            let asks = match one.operator.as_str() {
                "In" => Asks::In(values),
                "NotIn" => Asks::NotIn(values),
                "Exists" => Asks::Exists,
                "DoesNotExist" => Asks::Absent,
                _ => Asks::Never,
            };
            all.push((one.key.clone(), asks));
        }
        all.sort_unstable();
        all.dedup();
        Self(all)
    }

    /// Whether it selects an object with these labels.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, asks)| {
            let value = labels.get(key);
            match asks {
                Asks::In(values) => value.is_some_and(|v| values.contains(v)),
                Asks::NotIn(values) => !value.is_some_and(|v| values.contains(v)),
                Asks::Exists => value.is_some(),
                Asks::Absent => value.is_none(),
                Asks::Never => false,
            }
        })
    }
}
