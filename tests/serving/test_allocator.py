import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinax.serving.allocator import OutOfPages, PageAllocator, PageError


def test_counts_and_owners():
    allocator = PageAllocator(4, 16)
    pages = allocator.allocate(3, "a")
    assert (allocator.used_pages, allocator.free_pages) == (3, 1)
    assert [allocator.owner(page) for page in range(4)] == [("a" if page in pages else None) for page in range(4)]
    allocator.free(pages, "a")
    assert (allocator.used_pages, allocator.free_pages) == (0, 4)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (33, 3)])
def test_pages_for(tokens, pages):
    assert PageAllocator(4, 16).pages_for(tokens) == pages


def test_too_many_pages_allocates_none():
    allocator = PageAllocator(4, 16)
    allocator.allocate(2, "a")
    with pytest.raises(OutOfPages, match=r"3 pages asked for, 2 of 4 free"):
        allocator.allocate(3, "b")
    assert allocator.free_pages == 2


@pytest.mark.parametrize(
    ("pages", "owner", "match"),
    [
        ([2], "a", "page 2, which is free"),
        ([1], "a", "page 1, which is owned by 'b'"),
        ([4], "a", "page 4 doesn't exist"),
        ([-1], "a", "page -1 doesn't exist"),
        ([0, 0], "a", "twice in one call"),
        ([0, 2], "a", "page 2, which is free"),
        ([2], None, "page 2, which is free"),
    ],
)
def test_freeing_what_is_not_held_is_an_error_and_frees_nothing(pages, owner, match):
    allocator = PageAllocator(4, 16)
    assert (allocator.allocate(1, "a"), allocator.allocate(1, "b")) == ([0], [1])
    with pytest.raises(PageError, match=match):
        allocator.free(pages, owner)
    assert allocator.used_pages == 2
    assert allocator.owner(0) == "a"


def test_double_free_is_an_error():
    allocator = PageAllocator(4, 16)
    pages = allocator.allocate(2, "a")
    allocator.free(pages, "a")
    with pytest.raises(PageError, match="free only pages you hold, once"):
        allocator.free(pages, "a")


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PageAllocator(0, 16)
    with pytest.raises(ValueError, match="page_size must be at least 1, got -1"):
        PageAllocator(4, -1)
    with pytest.raises(PageError, match="can't allocate -1"):
        PageAllocator(4, 16).allocate(-1, "a")
    with pytest.raises(PageError, match="owner can't be None"):
        PageAllocator(4, 16).allocate(1, None)
    with pytest.raises(PageError, match="page 4 doesn't exist"):
        PageAllocator(4, 16).owner(4)


operations = st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), max_size=60)


@given(operations)
def test_random_use_against_a_dictionary(operations):
    """No page is lost or owned twice, and the same calls give the same pages."""
    num_pages = 7
    allocator, again = PageAllocator(num_pages, 2), PageAllocator(num_pages, 2)
    held: dict[int, list[int]] = {owner: [] for owner in range(4)}
    for allocate, count, owner in operations:
        if allocate and count > allocator.free_pages:
            with pytest.raises(OutOfPages):
                allocator.allocate(count, owner)
        elif allocate:
            pages = allocator.allocate(count, owner)
            assert pages == again.allocate(count, owner)
            held[owner] += pages
        else:
            pages, held[owner] = held[owner][:count], held[owner][count:]
            allocator.free(pages, owner)
            again.free(pages, owner)
        owners = {page: owner for owner, pages in held.items() for page in pages}
        assert len(owners) == sum(map(len, held.values())) == allocator.used_pages == num_pages - allocator.free_pages
        assert [allocator.owner(page) for page in range(num_pages)] == [owners.get(page) for page in range(num_pages)]
