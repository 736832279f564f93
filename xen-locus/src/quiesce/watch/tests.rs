//! Which words are hits.

use locus_guest::GuestType;
use locus_kernel::fixture_world::{World, PATCHED};

use super::*;

#[test]
fn a_watched_range_is_hit_behind_its_first_byte_and_up_to_its_end() {
    let watched = |start, len, name: &str| Watched::new(Range::new(Gva(start), len), name);
    let watch = Watch::of(vec![watched(0x2000, 0x10, "b"), watched(0x1000, 0x10, "a")]);
    let name = |word| watch.hit(word).map(|(w, offset)| (w.name.clone(), offset));
    assert_eq!(name(0x1000), None);
    assert_eq!(name(0x1001), Some(("a".into(), 1)));
    assert_eq!(name(0x1010), Some(("a".into(), 0x10)));
    assert_eq!(name(0x1011), None);
    assert_eq!(name(0x2008), Some(("b".into(), 8)));
    assert_eq!(name(0x3000), None);
    let words: Vec<u64> = (0xff0..0x2030).chain([0, u64::MAX]).collect();
    let stack: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let offsets = |found: &mut dyn Iterator<Item = (&Watched, u64)>| {
        found
            .map(|(w, offset)| (w.name.clone(), offset))
            .collect::<Vec<_>>()
    };
    let one_by_one = offsets(&mut words.iter().filter_map(|&w| watch.hit(w)));
    assert_eq!(offsets(&mut watch.hits(&stack)), one_by_one);
    assert_eq!(one_by_one.len(), 32);
    assert_eq!(Watch::default().hits(&stack).count(), 0);
    assert!(Watch::default().hit(5).is_none());
    // One within another.
    let watch = Watch::of(vec![
        watched(0x1010, 0x10, "b"),
        watched(0x1010, 0x10, "twin"),
        watched(0x1010, 0x20, "c"),
        watched(0x1000, 0x100, "a"),
    ]);
    let name = |word| watch.hit(word).map(|(w, offset)| (w.name.clone(), offset));
    assert_eq!(name(0x1018), Some(("b".into(), 8)));
    assert_eq!(name(0x1028), Some(("c".into(), 0x18)));
    assert_eq!(name(0x1080), Some(("a".into(), 0x80)));
    assert_eq!(name(0x1101), None);
    // A watch that is made of another one gives the same names.
    let ranges = watch
        .ranges()
        .map(|(range, name)| Watched::new(*range, name));
    for again in [watch.with(Vec::new()), Watch::of(ranges.collect())] {
        assert_eq!(again.hit(0x1018).map(|(w, _)| &*w.name), Some("b"));
    }
}

#[test]
fn a_cpu_at_the_first_byte_of_a_watched_range_is_in_it() {
    let watched = |start, name: &str| Watched::new(Range::new(Gva(start), 5), name);
    let watch = Watch::of(vec![watched(0x2000, "b"), watched(0x1000, "a")]);
    let name = |rip| watch.runs_in(rip).map(|(w, offset)| (&*w.name, offset));
    assert_eq!(name(0xfff), None);
    assert_eq!(name(0x1000), Some(("a", 0)));
    assert_eq!(name(0x1001), Some(("a", 1)));
    assert_eq!(name(0x1005), Some(("a", 5)));
    assert_eq!(name(0x1006), None);
    assert_eq!(name(0x2000), Some(("b", 0)));
    assert_eq!(name(u64::MAX), None);
}

#[test]
fn a_return_address_that_is_a_trampoline_s_first_byte_is_a_hit() {
    let range = Range::new(Gva(0x1000), 0x20);
    let watch = Watch::of(vec![Watched::whole(range, "return_to_handler")]);
    assert!(watch.hit(0xfff).is_none());
    assert_eq!(watch.hit(0x1000).unwrap().1, 0);
    assert_eq!(watch.hit(0x1020).unwrap().1, 0x20);
    assert!(watch.hit(0x1021).is_none());
}

#[test]
fn one_past_the_end_is_a_hit_only_behind_a_call() {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let range = Range::new(PATCHED, 0x10);
    let frame = kernel.space.walk(PATCHED).unwrap().frame;
    let watch = || {
        let patched = Watched::new(range, "patched");
        Watch::new(&kernel, vec![patched])
    };
    assert!(watch().unwrap().hit(range.end.0 - 1).is_some());
    assert!(watch().unwrap().hit(range.end.0).is_none());
    let call = [0xe8, 1, 2, 3, 4];
    world
        .memory
        .fill(frame, PATCHED.offset() + 0x10 - call.len(), &call);
    assert!(watch().unwrap().hit(range.end.0).is_some());
    assert!(watch().unwrap().hit(range.end.0 + 1).is_none());
}

#[test]
fn code_that_can_not_be_mapped_does_not_make_a_range_shorter() {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let frame = kernel.space.walk(PATCHED).unwrap().frame;
    world.memory.take(frame);
    let range = Watched::new(Range::new(PATCHED, 0x10), "patched");
    let error = Watch::new(&kernel, vec![range]).unwrap_err();
    assert!(error.to_string().contains("cannot be mapped"), "{error}");
}

#[test]
fn without_budget_no_watch_is_made() {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let range = || Watched::new(Range::new(PATCHED, 0x10), "patched");
    let budget = kernel.space.budget();
    let make = |left: u64, count: usize| {
        budget.renew();
        budget.spend(budget.limit() - left).unwrap();
        Watch::new(&kernel, (0..count).map(|_| range()).collect()).map(|_| ())
    };
    make(1 << 20, 1000).unwrap();
    // Not enough for so many, or for reading the code behind the last of them.
    for left in [0, 3999, 4000, 4200] {
        let error = make(left, 1000).unwrap_err();
        assert!(error.to_string().contains("given up"), "{left}: {error}");
    }
}

/// What [`Watch::hit`] is to find: the last range in the order of the watch that has the word behind its first byte.
fn slow_hit(watch: &Watch, word: u64) -> Option<(Range, &str)> {
    let has = |w: &&Watched| w.range.start.0 < word && word <= w.range.end.0;
    let found = watch.sorted.iter().rev().find(has)?;
    Some((found.range, &found.name))
}

#[test]
fn ranges_may_lie_over_each_other_in_any_way() {
    // Numbers without order: a xorshift generator.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |max: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % max
    };
    for round in 0..300 {
        let base = [0, u64::MAX - 40][round % 2];
        let ranges = (0..below(12))
            .map(|n| Watched::new(Range::new(Gva(base + below(40)), below(20)), n.to_string()));
        let watch = Watch::of(ranges.collect());
        for word in (0..70).map(|n| base.saturating_add(n)) {
            let hit = watch.hit(word).map(|(w, _)| (w.range, &*w.name));
            assert_eq!(hit, slow_hit(&watch, word), "{word:#x} in {watch:?}");
        }
    }
}

#[test]
fn a_look_up_costs_the_same_however_many_ranges_lie_below_it() {
    let range = |start, len| Watched::new(Range::new(Gva(start), len), "");
    let small = (0..200_000).map(|n| range(0x1000 + 16 * n, 8));
    let watch = Watch::of(small.chain([range(0, 1 << 40)]).collect());
    let began = std::time::Instant::now();
    for word in 0..200_000 {
        assert!(watch.hit((1 << 30) + word).is_some());
    }
    // To go through all of them each time takes a minute.
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
}
