//! Owns the arithmetic of rollouts: surge, unavailability, and shares of a scaling.

use super::revision::{self, DESIRED, MAX_REPLICAS};
use super::status;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, RollingUpdateDeployment};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Wanted pods of a Deployment.
pub(super) fn wanted(d: &Deployment) -> i32 {
    d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

/// Wanted pods of a ReplicaSet.
pub(super) fn replicas(rs: &ReplicaSet) -> i32 {
    rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

pub(super) fn paused(d: &Deployment) -> bool {
    d.spec.as_ref().and_then(|s| s.paused).unwrap_or(false)
}

pub(super) fn is_rolling(d: &Deployment) -> bool {
    let strategy = d.spec.as_ref().and_then(|s| s.strategy.as_ref()).and_then(|s| s.type_.as_deref());
    strategy != Some("Recreate")
}

/// Sort key: age, then name for sets created in the same second.
pub(super) fn by_creation(rs: &ReplicaSet) -> (Option<jiff::Timestamp>, String) {
    (rs.metadata.creation_timestamp.as_ref().map(|t| t.0), rs.metadata.name.clone().unwrap_or_default())
}

fn scaled(value: Option<&IntOrString>, of: i32, round_up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(n)) => *n,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.strip_suffix('%').and_then(|p| p.parse().ok()).unwrap_or(0);
            let product = percent * i64::from(of);
            let whole = if round_up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
            i32::try_from(whole).unwrap_or(i32::MAX)
        }
    }
}

fn fenceposts(d: &Deployment) -> (i32, i32) {
    let rolling = d.spec.as_ref().and_then(|s| s.strategy.as_ref()).and_then(|s| s.rolling_update.as_ref());
    let default = RollingUpdateDeployment {
        max_surge: Some(IntOrString::String("25%".into())),
        max_unavailable: Some(IntOrString::String("25%".into())),
    };
    let rolling = rolling.unwrap_or(&default);
    let surge = scaled(rolling.max_surge.as_ref(), wanted(d), true);
    let unavailable = scaled(rolling.max_unavailable.as_ref(), wanted(d), false);
    // Both may round to zero; a rollout must be able to move.
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
}

/// Pods above the wanted number that a rollout may have.
pub(super) fn max_surge(d: &Deployment) -> i32 {
    if is_rolling(d) { fenceposts(d).0 } else { 0 }
}

/// Pods below the wanted number that a rollout may have.
pub(super) fn max_unavailable(d: &Deployment) -> i32 {
    if !is_rolling(d) || wanted(d) == 0 {
        return 0;
    }
    fenceposts(d).1.min(wanted(d))
}

/// The size to which the new ReplicaSet may grow now.
pub(super) fn new_set_replicas(d: &Deployment, total: i32, have: i32) -> i32 {
    if !is_rolling(d) {
        return wanted(d);
    }
    let max_total = wanted(d) + max_surge(d);
    if total >= max_total {
        return have;
    }
    have + (max_total - total).min(wanted(d) - have)
}

/// Whether a ReplicaSet carries the whole Deployment.
pub(super) fn is_saturated(d: &Deployment, rs: &ReplicaSet) -> bool {
    let wanted = wanted(d);
    revision::annotation_number(rs, DESIRED) == Some(i64::from(wanted))
        && replicas(rs) == wanted
        && status::available(rs) == wanted
}

/// A ReplicaSet's share of `to_add` pods (negative: to remove), of which `added` are given out already.
pub(super) fn proportion(d: &Deployment, rs: &ReplicaSet, to_add: i32, added: i32) -> i32 {
    let have = replicas(rs);
    if have == 0 || to_add == 0 || to_add == added {
        return 0;
    }
    let share = fraction(d, rs, have);
    let left = to_add - added;
    if to_add > 0 { share.min(left) } else { share.max(left) }
}

fn fraction(d: &Deployment, rs: &ReplicaSet, have: i32) -> i32 {
    if wanted(d) == 0 {
        return -have;
    }
    let max_now = f64::from(wanted(d) + max_surge(d));
    // The size that the sizes of the sets were made for; without it, the size that the status tells of.
    let recorded = revision::annotation_number(rs, MAX_REPLICAS).filter(|n| *n != 0);
    let recorded = recorded.and_then(|n| i32::try_from(n).ok());
    let before = recorded.or_else(|| d.status.as_ref().and_then(|s| s.replicas)).unwrap_or(0);
    if before == 0 {
        return 0;
    }
    let size = (f64::from(have) * max_now / f64::from(before)).round();
    #[expect(clippy::cast_possible_truncation, reason = "a saturating cast of a number of pods")]
    let size = size as i32;
    size - have
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::deployment;
    use super::*;

    #[test]
    fn percentages_round_surge_up_and_unavailability_down() {
        let rows = [
            (10, "25%", "25%", 3, 2),
            (1, "25%", "25%", 1, 0),
            (3, "0%", "10%", 0, 1),
            (0, "25%", "25%", 0, 0),
            (2, "100%", "100%", 2, 2),
        ];
        for (wanted, surge, unavailable, max_s, max_u) in rows {
            let d = deployment(wanted, surge, unavailable);
            assert_eq!(
                (max_surge(&d), max_unavailable(&d)),
                (max_s, max_u),
                "{wanted} {surge} {unavailable}"
            );
        }
    }
}
