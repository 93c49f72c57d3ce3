//! What most objects have alike, kept once: the ports of nearly all Services are one of a few lists.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// Lists so few that those which nobody has any more are not looked for.
const FEW: usize = 64;

/// Lists that are shared.
#[derive(Debug)]
pub(super) struct Shared<T> {
    lists: HashSet<Arc<[T]>>,
    /// How many there may be before it is looked which of them nobody has.
    limit: usize,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self { lists: HashSet::new(), limit: FEW }
    }
}

impl<T: Eq + Hash> Shared<T> {
    /// The one that is equal and was there first.
    pub(super) fn share(&mut self, list: Arc<[T]>) -> Arc<[T]> {
        if let Some(known) = self.lists.get(&list) {
            return Arc::clone(known);
        }
        if self.lists.len() >= self.limit {
            self.lists.retain(|list| Arc::strong_count(list) > 1);
            self.limit = (2 * self.lists.len()).max(FEW);
        }
        self.lists.insert(Arc::clone(&list));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lists_are_one_and_forgotten_ones_go() {
        let mut shared = Shared::default();
        let first = shared.share(Arc::from([1, 2]));
        assert!(Arc::ptr_eq(&first, &shared.share(Arc::from([1, 2]))));
        let kept: Vec<_> = (0..FEW).map(|number| shared.share(Arc::from([number]))).collect();
        for number in 0..10 * FEW {
            shared.share(Arc::from([number, 0, 0]));
            assert!(shared.lists.len() <= 2 * (kept.len() + 1));
        }
        assert!(Arc::ptr_eq(&first, &shared.share(Arc::from([1, 2]))) && shared.lists.contains(&kept[7]));
    }
}
