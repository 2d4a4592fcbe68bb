from django.urls import path
from notes import views

urlpatterns = [
    path("", views.page),
    path("add", views.add),
    path("search", views.search),
    path("ask", views.ask),
]
