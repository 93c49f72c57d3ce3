//! ConfigMaps, Secrets, ServiceAccounts: defaults and validation.

mod validation;

use serde_json::Value;

use super::value::default_zero;

pub(super) use validation::{create, update};

/// Applies the defaults of `kind`; does nothing for a kind of another family.
pub(super) fn default(group: &str, kind: &str, object: &mut Value) {
    if (group, kind) == ("", "Secret") {
        default_zero(object, "type", "Opaque");
    }
}
