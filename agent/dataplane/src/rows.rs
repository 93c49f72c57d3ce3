//! A hash map for very many entries. They stand one behind the other, and what is partly empty, as in every hash map, has four bytes a
//! place instead of a whole entry.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher as _, Hash, RandomState};

use hashbrown::HashTable;

/// Where an entry stands, for as long as it is there.
pub(crate) type Place = u32;

/// Entries by their key. Each keeps its place until it is removed; then another may have it.
pub(crate) struct Rows<K, V> {
    rows: Vec<Option<(K, V)>>,
    free: Vec<Place>,
    index: HashTable<Place>,
    hasher: RandomState,
}

impl<K, V> Default for Rows<K, V> {
    fn default() -> Self {
        Self { rows: Vec::new(), free: Vec::new(), index: HashTable::new(), hasher: RandomState::new() }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Rows<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K, V> Rows<K, V> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// All entries, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.rows.iter().flatten().map(|(key, value)| (key, value))
    }

    /// The entry at a place.
    pub(crate) fn at(&self, place: Place) -> Option<(&K, &V)> {
        self.rows.get(place as usize)?.as_ref().map(|(key, value)| (key, value))
    }

    /// The value at a place.
    pub(crate) fn at_mut(&mut self, place: Place) -> Option<&mut V> {
        self.rows.get_mut(place as usize)?.as_mut().map(|(_, value)| value)
    }
}

impl<K: Eq + Hash, V> Rows<K, V> {
    /// Where a key stands.
    pub(crate) fn place<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Place>
    where
        K: Borrow<Q>,
    {
        self.index.find(self.hasher.hash_one(key), |place| has(&self.rows, *place, key)).copied()
    }

    /// The value of a key.
    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.place(key).and_then(|place| self.at(place)).map(|(_, value)| value)
    }

    /// Likewise, to be changed.
    pub(crate) fn get_mut<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        self.place(key).and_then(|place| self.at_mut(place))
    }

    /// The place of a key; if it has none it gets one, with this value.
    pub(crate) fn enter(&mut self, key: K, value: impl FnOnce(&K) -> V) -> Place {
        let hash = self.hasher.hash_one(&key);
        if let Some(place) = self.index.find(hash, |place| has(&self.rows, *place, &key)) {
            return *place;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.rows.push(None);
            Place::try_from(self.rows.len() - 1).expect("the kernel's maps take far fewer entries")
        });
        let value = value(&key);
        self.rows[place as usize] = Some((key, value));
        let (rows, hasher) = (&self.rows, &self.hasher);
        self.index.insert_unique(hash, place, |place| {
            rows[*place as usize].as_ref().map_or(0, |(key, _)| hasher.hash_one(key))
        });
        place
    }

    /// Removes a key.
    pub(crate) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let found = self.index.find_entry(hash, |place| has(&self.rows, *place, key)).ok()?;
        let (place, _) = found.remove();
        self.free.push(place);
        self.rows[place as usize].take().map(|(_, value)| value)
    }
}

impl<K: Eq + Hash, V: Default> Rows<K, V> {
    /// The value of a key, an empty one if there was none.
    pub(crate) fn or_default(&mut self, key: K) -> &mut V {
        let place = self.enter(key, |_| V::default());
        let row = self.rows[place as usize].as_mut().expect("it was entered just now");
        &mut row.1
    }
}

fn has<Q: Eq + ?Sized, K: Borrow<Q>, V>(rows: &[Option<(K, V)>], place: Place, key: &Q) -> bool {
    rows[place as usize].as_ref().is_some_and(|(entry, _)| entry.borrow() == key)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Keys from a few, so that most are met again.
        #[test]
        fn it_is_a_map(steps in vec((any::<bool>(), 0_u8..24, any::<u16>()), 0..300)) {
            let (mut rows, mut plain) = (Rows::default(), BTreeMap::new());
            for (enters, key, value) in steps {
                if enters {
                    let place = rows.enter(key, |_| value);
                    plain.entry(key).or_insert(value);
                    prop_assert_eq!(rows.place(&key), Some(place));
                    prop_assert_eq!(rows.at(place), Some((&key, &plain[&key])));
                } else {
                    prop_assert_eq!(rows.remove(&key), plain.remove(&key));
                }
                prop_assert_eq!(rows.len(), plain.len());
            }
            prop_assert_eq!(rows.iter().map(|(key, value)| (*key, *value)).collect::<BTreeMap<_, _>>(), plain);
        }
    }

    #[test]
    fn a_place_stays_while_others_come_and_go_and_is_used_again() {
        let mut rows = Rows::default();
        let places: Vec<Place> = (0..100).map(|key| rows.enter(key, |key| *key)).collect();
        (0..100).filter(|key| key % 2 == 0).for_each(|key| assert!(rows.remove(&key).is_some()));
        let more: Vec<Place> = (200..240).map(|key| rows.enter(key, |key| *key)).collect();
        assert!(more.iter().all(|place| place % 2 == 0), "those of keys that went");
        for key in (1..100).step_by(2) {
            assert_eq!(rows.place(&key), Some(places[key as usize]));
        }
        assert_eq!((rows.rows.len(), rows.len()), (100, 90));
    }
}
