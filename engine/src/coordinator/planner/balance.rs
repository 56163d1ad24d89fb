//! Levels loads, one unit at a time, along paths.
//!
//! A unit (a replica, a primary) can't always go straight from the fullest store to the emptiest:
//! the shards of the one may have no place on the other. A path of several steps then does it: each
//! store on the way gives one unit and takes one. As in any flow problem, loads differ by more than
//! one only while such a path exists, so the search is exact if it goes on while there is a path.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::ids::StoreId;

/// The move of one unit from one store to another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BalanceStep<T> {
    /// The unit that moves.
    pub unit: T,
    /// The store that gives it.
    pub from: StoreId,
    /// The store that takes it.
    pub to: StoreId,
}

/// The shortest path that takes one unit from the fullest possible store to a store with at least
/// two less, last step first. `step` names a unit that can go straight from one store to another.
pub fn path<T: Copy>(
    loads: &BTreeMap<StoreId, usize>,
    step: impl Fn(StoreId, StoreId) -> Option<T>,
) -> Option<Vec<BalanceStep<T>>> {
    path_past(&mut BTreeSet::new(), loads, step)
}

/// Like [`path`], one of several in a row. `dead_ends` are stores from which the searches before
/// found no path, and this one adds its own. There must be none from them now: loads were changed
/// by these paths alone, and what can't go from one store to another still can't.
pub fn path_past<T: Copy>(
    dead_ends: &mut BTreeSet<StoreId>,
    loads: &BTreeMap<StoreId, usize>,
    step: impl Fn(StoreId, StoreId) -> Option<T>,
) -> Option<Vec<BalanceStep<T>>> {
    let mut emptiest: Vec<(usize, StoreId)> = loads.iter().map(|(&id, &load)| (load, id)).collect();
    emptiest.sort();
    let &(least, _) = emptiest.first()?;
    let is_full = |(load, _): &(usize, StoreId)| *load >= least + 2;
    let mut heads: Vec<_> = emptiest.iter().copied().filter(is_full).collect();
    heads.sort_by_key(|&(load, id)| (std::cmp::Reverse(load), id));
    // A store that was passed by the search from a fuller one, which found no path, has none
    // either.
    heads.into_iter().find_map(|head| {
        if dead_ends.contains(&head.1) {
            return None;
        }
        path_from(head, &emptiest, &step, dead_ends)
    })
}

/// `emptiest`: all stores by load. Of paths of the same length one to an emptier store levels more.
fn path_from<T: Copy>(
    (load, from): (usize, StoreId),
    emptiest: &[(usize, StoreId)],
    step: impl Fn(StoreId, StoreId) -> Option<T>,
    dead_ends: &mut BTreeSet<StoreId>,
) -> Option<Vec<BalanceStep<T>>> {
    let mut came: BTreeMap<StoreId, BalanceStep<T>> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(at) = queue.pop_front() {
        for &(load_of_next, to) in emptiest {
            if to == from || came.contains_key(&to) || dead_ends.contains(&to) {
                continue;
            }
            let Some(unit) = step(at, to) else { continue };
            came.insert(to, BalanceStep { unit, from: at, to });
            if load_of_next + 2 <= load {
                return Some(walk_back(&came, from, to));
            }
            queue.push_back(to);
        }
    }
    dead_ends.insert(from);
    dead_ends.extend(came.into_keys());
    None
}

fn walk_back<T: Copy>(
    came: &BTreeMap<StoreId, BalanceStep<T>>,
    from: StoreId,
    to: StoreId,
) -> Vec<BalanceStep<T>> {
    let mut steps = Vec::new();
    let mut at = to;
    while at != from {
        let step = came[&at];
        steps.push(step);
        at = step.from;
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> StoreId {
        StoreId(n)
    }

    #[track_caller]
    fn check(loads: &[(u128, usize)], edges: &[(u128, u128)], want: Option<&[(u128, u128)]>) {
        let loads = loads.iter().map(|&(n, load)| (id(n), load)).collect();
        let step = |from: StoreId, to: StoreId| edges.contains(&(from.0, to.0)).then_some(());
        let found = path(&loads, step);
        let found: Option<Vec<(u128, u128)>> =
            found.map(|steps| steps.iter().rev().map(|step| (step.from.0, step.to.0)).collect());
        assert_eq!(found.as_deref(), want);
    }

    #[test]
    fn straight_where_it_can() {
        check(&[(1, 3), (2, 1), (3, 2)], &[(1, 2), (1, 3), (3, 2)], Some(&[(1, 2)]));
    }

    #[test]
    fn by_way_of_others_where_it_must() {
        check(&[(1, 3), (2, 1), (3, 2)], &[(1, 3), (3, 2)], Some(&[(1, 3), (3, 2)]));
    }

    #[test]
    fn not_at_all_when_level_or_cut_off() {
        check(&[(1, 2), (2, 1)], &[(1, 2)], None);
        check(&[(1, 5), (2, 1)], &[(2, 1)], None);
        check(&[], &[], None);
    }

    #[test]
    fn from_the_next_when_the_fullest_is_stuck() {
        check(&[(1, 9), (2, 3), (3, 1)], &[(2, 3)], Some(&[(2, 3)]));
    }

    #[test]
    fn a_dead_end_is_searched_once() {
        // 1 and 2 reach each other and 3, from which there is no way on; 4 is empty.
        let loads = [(1, 9), (2, 9), (3, 9), (4, 0)].map(|(n, load)| (id(n), load)).into();
        let searched = std::cell::RefCell::new(Vec::new());
        let step = |from: StoreId, to: StoreId| {
            searched.borrow_mut().push(from.0);
            (from.0 != 3 && to.0 != 4).then_some(())
        };
        let mut dead_ends = BTreeSet::new();
        assert_eq!(path_past(&mut dead_ends, &loads, step), None);
        assert_eq!(searched.take(), [1, 1, 1, 2, 3]);
        assert_eq!(path_past(&mut dead_ends, &loads, step), None);
        assert_eq!(searched.take(), []);
    }
}
