//! Which work comes next: one queue for each guest, in rounds.
//!
//! Guests take turns, so a guest with many requests holds up no other. A guest whose last work took long, or ended its worker,
//! is slow. One that was soon found not to be ready is not: there may be many that never are. Slow guests come after the
//! others, and only some workers work for them, so that others never wait for them.
//!
//! What nobody asked for, publishing and applying again, is done when no request can be begun, by some of the workers. However
//! long it takes, there is room for requests beside it.
//!
//! Work that is put off stays at the head of its guest's queue: what was asked for later must not be done before it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use locus_xen::uuid;

use super::work::{End, Work};

/// Most workers at once for guests that are not slow.
const QUICK: usize = 3;
/// Most workers that are begun for slow guests.
const SLOW: usize = 2;
/// Most workers at all. There are more than those two make when work turns out to be slow: another one takes its place.
const MOST: usize = 8;
/// Most workers for what nobody asked for, one fewer of each kind. The others are for requests alone.
const BACKGROUND: usize = QUICK + SLOW - 2;
/// Work that takes longer makes a guest slow.
const LONG: Duration = Duration::from_secs(1);

/// Work for one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) work: Work,
    /// UUID of the guest, or its name. At most one job of a guest runs at a time.
    pub(super) guest: String,
    /// Nobody asked for it.
    pub(super) is_background: bool,
}

/// Queues of guests, and the order of their next turns.
#[derive(Debug, Default)]
struct Rounds {
    turns: VecDeque<String>,
    jobs: HashMap<String, VecDeque<Job>>,
    /// When the first job of a guest may be begun, if it was put off.
    due: HashMap<String, Instant>,
}

impl Rounds {
    fn push(&mut self, job: Job) {
        let queue = self.jobs.entry(job.guest.clone()).or_default();
        if queue.is_empty() {
            self.turns.push_back(job.guest.clone());
        }
        queue.push_back(job);
    }

    /// `job`, which was taken, is the first one of its guest again, from `due` on.
    fn put_off(&mut self, job: Job, due: Instant) {
        self.due.insert(job.guest.clone(), due);
        let queue = self.jobs.entry(job.guest.clone()).or_default();
        if queue.is_empty() {
            self.turns.push_back(job.guest.clone());
        }
        queue.push_front(job);
    }

    /// The first job of the first guest that `may` have its turn, and whose first job is due. That guest goes to the end of the
    /// round.
    fn take(&mut self, now: Instant, may: impl Fn(&str) -> bool) -> Option<Job> {
        let is_due = |guest: &String| self.due.get(guest).is_none_or(|due| *due <= now);
        let has_turn = |guest: &String| may(guest) && is_due(guest);
        let at = self.turns.iter().position(has_turn)?;
        let guest = self.turns.remove(at)?;
        self.due.remove(&guest);
        let queue = self.jobs.get_mut(&guest)?;
        let job = queue.pop_front();
        match queue.is_empty() {
            true => drop(self.jobs.remove(&guest)),
            false => self.turns.push_back(guest),
        }
        job
    }
}

/// All work that waits, and what runs.
#[derive(Debug, Default)]
pub(super) struct Queue {
    asked: Rounds,
    background: Rounds,
    /// Jobs that run, and when they began.
    running: Vec<(Job, Instant)>,
    slow: HashSet<String>,
}

impl Queue {
    pub(super) fn push(&mut self, job: Job) {
        match job.is_background {
            true => self.background.push(job),
            false => self.asked.push(job),
        }
    }

    /// A job that has ended, or was not begun, is to be done at `due`, before all others of its guest.
    pub(super) fn put_off(&mut self, job: Job, due: Instant) {
        match job.is_background {
            true => self.background.put_off(job, due),
            false => self.asked.put_off(job, due),
        }
    }

    /// What was put off for `guest` is due now.
    pub(super) fn hasten(&mut self, guest: &str) {
        self.asked.due.remove(guest);
    }

    /// The job that is to be begun now, if there is one. It counts as running until [`Queue::ended`] or [`Queue::not_begun`].
    pub(super) fn next(&mut self, now: Instant) -> Option<Job> {
        let job = self.take(now, false).or_else(|| self.take(now, true))?;
        self.running.push((job.clone(), now));
        Some(job)
    }

    fn take(&mut self, now: Instant, background: bool) -> Option<Job> {
        let is_slow = |(job, began): &&(Job, Instant)| {
            self.slow.contains(&job.guest) || now.duration_since(*began) > LONG
        };
        let of_kind = |(job, _): &&(Job, Instant)| background == job.is_background;
        let running = self.running.iter().filter(of_kind);
        let slow = running.clone().filter(is_slow).count();
        let all = running.count();
        let quick = all - slow;
        // Background work has one worker fewer of each kind.
        let less = usize::from(background);
        let is_room = self.running.len() < MOST && !(background && all >= BACKGROUND);
        let may_begin = is_room && quick < QUICK - less;
        let slow_may_begin = is_room && slow < SLOW - less;
        let is_free = |guest: &str| self.running.iter().all(|(job, _)| job.guest != guest);
        let known = &self.slow;
        let from = match background {
            true => &mut self.background,
            false => &mut self.asked,
        };
        let first = from.take(now, |guest| {
            may_begin && is_free(guest) && !known.contains(guest)
        });
        first.or_else(|| from.take(now, |g| slow_may_begin && is_free(g) && known.contains(g)))
    }

    /// A job that was to be begun was not.
    pub(super) fn not_begun(&mut self, job: &Job) {
        self.running.retain(|(running, _)| running != job);
    }

    /// A job has ended.
    pub(super) fn ended(&mut self, job: &Job, end: &End, now: Instant) {
        let began = self.running.iter().find(|(running, _)| running == job);
        let took = began.map_or(Duration::ZERO, |(_, began)| now.duration_since(*began));
        self.not_begun(job);
        match took > LONG || matches!(end, End::Died(_)) {
            true => drop(self.slow.insert(job.guest.clone())),
            false => drop(self.slow.remove(&job.guest)),
        }
    }

    /// Forgets how slow the guests are whose UUIDs are not among those that are `there`. Names stay: there are as many as
    /// requests have given.
    pub(super) fn retain_slow(&mut self, there: &HashSet<&str>) {
        self.slow
            .retain(|guest| !uuid::is_text(guest) || there.contains(&**guest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(guest: &str, id: &str) -> Job {
        Job {
            work: Work::Request(id.into()),
            guest: guest.into(),
            is_background: false,
        }
    }

    fn background(guest: &str) -> Job {
        Job {
            is_background: true,
            ..request(guest, "publish")
        }
    }

    /// Begins all that may be begun; names of the guests.
    fn begin(queue: &mut Queue, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| queue.next(now))
            .map(|job| job.guest)
            .collect()
    }

    #[test]
    fn guests_take_turns_and_each_has_one_job_at_a_time_in_its_own_order() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for n in 0..100 {
            queue.push(request("a", &n.to_string()));
        }
        queue.push(request("b", "b"));
        assert_eq!(begin(&mut queue, now), ["a", "b"]);
        queue.ended(&request("a", "0"), &End::Done, now);
        queue.push(request("c", "c"));
        assert_eq!(queue.next(now), Some(request("a", "1")));
        assert_eq!(queue.next(now), Some(request("c", "c")));
        assert_eq!(queue.next(now), None);
    }

    #[test]
    fn what_is_put_off_holds_up_its_own_guest_alone() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let later = now + LONG;
        for job in [request("a", "0"), request("a", "1"), request("b", "b")] {
            queue.push(job);
        }
        assert_eq!(queue.next(now), Some(request("a", "0")));
        queue.ended(&request("a", "0"), &End::Later, now);
        queue.put_off(request("a", "0"), later);
        assert_eq!(begin(&mut queue, now), ["b"]);
        assert_eq!(queue.next(later), Some(request("a", "0")));
        queue.not_begun(&request("a", "0"));
        assert_eq!(queue.next(later), Some(request("a", "1")));
        // Alone in its queue too.
        queue.ended(&request("a", "1"), &End::Later, later);
        queue.put_off(request("a", "1"), later + LONG);
        assert_eq!(queue.next(later), None);
        queue.hasten("a");
        assert_eq!(queue.next(later), Some(request("a", "1")));
    }

    #[test]
    fn a_request_comes_before_what_nobody_asked_for() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for n in 0..9 {
            queue.push(background(&format!("p{n}")));
        }
        // Not by all workers: a request finds one.
        assert_eq!(begin(&mut queue, now), ["p0", "p1"]);
        queue.push(request("a", "a"));
        assert_eq!(begin(&mut queue, now), ["a"]);
    }

    #[test]
    fn what_nobody_asked_for_keeps_no_request_out_however_long_it_takes() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.slow.insert("slow".into());
        for n in 0..20 {
            queue.push(background(&format!("p{n}")));
        }
        let mut begun = Vec::new();
        for _ in 0..10 {
            begun.extend(begin(&mut queue, now));
            now += LONG * 2;
        }
        assert_eq!(begun, ["p0", "p1", "p2"]);
        // Of guests of both kinds.
        let requests = ["a", "b", "c", "slow"];
        for guest in requests {
            queue.push(request(guest, guest));
        }
        assert_eq!(begin(&mut queue, now), requests);
    }

    #[test]
    fn quick_guests_wait_for_no_stubborn_one() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        let stubborn = ["s1", "s2", "s3"];
        for s in stubborn {
            queue.push(request(s, s));
            queue.push(request(s, "again"));
        }
        // Nobody knows them yet.
        assert_eq!(begin(&mut queue, now), stubborn);
        for n in 0..40 {
            queue.push(request(&format!("c{n}"), "c"));
        }
        assert_eq!(begin(&mut queue, now), [""; 0]);
        now += LONG * 2;
        assert_eq!(begin(&mut queue, now), ["c0", "c1", "c2"]);
        for s in stubborn {
            queue.ended(&request(s, s), &End::Done, now);
        }
        // They are known now.
        assert_eq!(begin(&mut queue, now), ["s1", "s2"]);
        for n in 0..37 {
            queue.ended(&request(&format!("c{n}"), "c"), &End::Done, now);
            assert_eq!(begin(&mut queue, now), [format!("c{}", n + 3)]);
        }
        queue.ended(&request("s1", "again"), &End::Done, now);
        // It was quick, so it is not slow any more; s3 still is.
        assert_eq!(begin(&mut queue, now), ["s3"]);
        assert!(!queue.slow.contains("s1") && queue.slow.contains("s3"));
    }

    /// Median time from submission to answer of quick guests' requests, beside stubborn guests that always have another one.
    fn median(quick: usize, stubborn: usize) -> Duration {
        const QUICK_TIME: Duration = Duration::from_millis(200);
        const BLOCKED: Duration = Duration::from_secs(30);
        let (mut queue, start) = (Queue::default(), Instant::now());
        let mut now = start;
        let mut running: Vec<(Instant, Job)> = Vec::new();
        let mut waits = Vec::new();
        for s in 0..stubborn {
            queue.push(request(&format!("s{s}"), "s"));
        }
        for n in 0..quick * 5 {
            queue.push(request(&format!("c{}", n % quick), "c"));
        }
        while waits.len() < quick * 5 {
            while let Some(job) = queue.next(now) {
                let is_quick = job.guest.starts_with('c');
                running.push((now + if is_quick { QUICK_TIME } else { BLOCKED }, job));
            }
            // As the daemon, it looks again in a moment.
            now += Duration::from_millis(10);
            let ended: Vec<_> = running.extract_if(.., |(end, _)| *end <= now).collect();
            for (_, job) in ended {
                queue.ended(&job, &End::Done, now);
                match job.guest.starts_with('c') {
                    true => waits.push(now - start),
                    false => queue.push(job),
                }
            }
        }
        waits[waits.len() / 2]
    }

    #[test]
    fn forty_quick_guests_hardly_wait_longer_beside_three_stubborn_ones() {
        let alone = median(40, 0);
        for stubborn in [1, 3] {
            let beside = median(40, stubborn);
            // Until it is known that they are stubborn.
            assert!(beside <= alone + LONG * 2, "{alone:?} {beside:?}");
        }
    }

    #[test]
    fn what_took_long_or_ended_its_worker_is_slow_until_it_is_quick() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        for (end, took, slow) in [
            (End::Later, Duration::ZERO, false),
            (End::Later, LONG * 2, true),
            (End::Later, Duration::ZERO, false),
            (End::Died("signal 9".into()), Duration::ZERO, true),
            (End::Done, Duration::ZERO, false),
            (End::Done, LONG * 2, true),
        ] {
            queue.push(background("a"));
            let job = queue.next(now).unwrap();
            now += took;
            queue.ended(&job, &end, now);
            assert_eq!(queue.slow.contains("a"), slow, "{end:?} {took:?}");
        }
        let uuid = |n: u8| format!("00000000-0000-0000-0000-00000000000{n}");
        let (there, gone) = (uuid(1), uuid(2));
        queue.slow = HashSet::from([there.clone(), gone.clone(), "web".into()]);
        queue.retain_slow(&HashSet::from([&*there]));
        assert_eq!(queue.slow, HashSet::from([there, "web".into()]));
    }
}
